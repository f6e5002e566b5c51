"""The documentation says what the project does: pages that are made are current, links lead
somewhere, and what its pages tell to type runs."""

import json
import re
import runpy
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from kvplug import parse, read_offer, read_settings
from kvplug.new_method import write

ROOT = Path(__file__).parents[2]
LINE = re.compile(
    r"""KVPLUG_POLICY="([^"]+)"|--kvplug-policy (?:'([^'{]+)'|"([^"{]+)")"""
    r"""|"policy": "((?:[^"\\]|\\.)+)\""""
)
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def tool(name):
    return runpy.run_path(str(ROOT / f"tools/{name}.py"))


def test_a_page_for_each_method_is_current():
    wanted = tool("method_pages")["pages"]()
    there = {file.stem: file.read_text() for file in (ROOT / "docs/methods").glob("*.md")}
    assert there.keys() == wanted.keys(), "run tools/method_pages.py"
    for name, text in wanted.items():
        assert there[name] == text, f"{name}: run tools/method_pages.py"
        assert len(re.findall("^## ", text, re.M)) in (0, 4), name


def test_every_page_is_in_the_site_s_navigation():
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
    pages = {str(file.relative_to(ROOT / "docs")) for file in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted(pages)


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http:", "https:")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_readme_is_short_and_shows_the_chart():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") < 150
    assert "docs/assets/answers.svg" in readme.split("\n\n")[2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lines_that_are_told_to_type_are_policies(page):
    said = LINE.findall(page.read_text())
    for line in (next(filter(None, found)) for found in said):
        if "…" not in line and not line.startswith(("my_method", "random_pages")):
            parse(line.replace('\\"', '"'))


def test_the_code_of_the_page_of_new_methods_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/new-method.md").read_text(), re.S)
    assert len(blocks) == 3
    exec("\n".join(blocks), {})


def test_a_new_method_runs_as_it_is_written(tmp_path):
    files = write("my_own_method", tmp_path / "package")
    assert sorted(file.name for file in files) == [
        "my_own_method.py", "pyproject.toml", "test_my_own_method.py",
    ]  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path / "package"],
        capture_output=True, text=True, cwd=tmp_path / "package",
        env={"PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 passed" in run.stdout


@pytest.mark.parametrize("name", ["My", "1a", "class", "a-b", ""])
def test_names_that_cannot_be(name, tmp_path):
    with pytest.raises(ValueError, match="my_method"):
        write(name, tmp_path / "new")
    with pytest.raises(ValueError, match="--out"):
        write("fine", tmp_path)


def test_forms_and_citation_are_read():
    for file in [*(ROOT / ".github").rglob("*.yml"), ROOT / "CITATION.cff"]:
        assert yaml.safe_load(file.read_text()), file
    forms = [yaml.safe_load(f.read_text()) for f in ROOT.glob(".github/ISSUE_TEMPLATE/*.yml")]
    for form in (form for form in forms if "body" in form):
        assert {"name", "description"} <= form.keys()
        assert all("label" in x["attributes"] for x in form["body"] if x["type"] != "markdown")


def test_containers_name_what_is_there():
    """Never built where there are no containers: paths, ports and the line are read."""
    folder = ROOT / "containers"
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (folder / source).exists(), source
    build = services["server"]["build"]
    assert (folder / build["context"] / build["dockerfile"]).is_file()
    scraped = yaml.safe_load((folder / "prometheus.yaml").read_text())["scrape_configs"]
    (target,) = scraped[0]["static_configs"][0]["targets"]
    name, _, port = target.partition(":")
    assert f"{port}:{port}" in services[name]["ports"]
    provider = yaml.safe_load((folder / "grafana/dashboards.yaml").read_text())["providers"][0]
    shown = [volume for volume in services["grafana"]["volumes"] if "../dashboards:" in volume]
    assert shown == [f"../dashboards:{provider['options']['path']}:ro"]
    config = services["server"]["command"][-1]
    filled = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", config)
    assert read_offer(json.loads(filled)["kvplug"], environ={}).settings == read_settings({}, {})


def instructions():
    """Of the container file: word and rest."""
    text = (ROOT / "containers/Containerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def test_the_container_file_copies_the_wheel_that_is_built_and_nothing_else():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    given = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG")
    assert given["WHEEL"] == f"kvplug-{project['version']}-py3-none-any.whl"
    (copied,) = [rest.split() for word, rest in instructions() if word == "COPY"]
    assert copied == ["dist/${WHEEL}", "/tmp/"]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[-2:] == ["*", "!dist/kvplug-*.whl"], "a context is the wheel alone"
    assert fnmatch(f"dist/{given['WHEEL']}", ignored[-1].removeprefix("!"))


def test_the_container_file_serves_an_engine_that_the_project_is_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    given = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG")
    (engine,) = map(Requirement, project["optional-dependencies"]["vllm"])
    image, _, tag = given["BASE"].rpartition(":")
    assert image.endswith("vllm/vllm-openai")
    assert engine.specifier.contains(tag.removeprefix("v"))
    said = (ROOT / "docs/compatibility.md").read_text()
    assert tag.removeprefix("v") in said


def test_the_container_file_s_commands_parse():
    words = [word for word, _ in instructions()]
    assert words == ["ARG", "FROM", "ARG", "COPY", "RUN", "ENTRYPOINT"]
    steps = dict(instructions())
    subprocess.run(["sh", "-n", "-c", steps["RUN"]], check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extra,) = re.findall(r"\[(\w+)\]", steps["RUN"])
    assert extra in project["optional-dependencies"]
    assert "kvplug" in project["scripts"]
    assert json.loads(steps["ENTRYPOINT"]) == ["vllm", "serve"]
    services = yaml.safe_load((ROOT / "containers/compose.yaml").read_text())["services"]
    assert services["server"]["command"][1:3] == ["--attention-backend", "kvplug"]
    for service in services.values():  # none that changes under its name
        assert re.search(r":v?\d[\d.]+$", service.get("image", ":0.0"))


def test_the_list_of_policies_can_be_had_as_json():
    testing = pytest.importorskip("typer.testing")
    from kvplug.cli import app

    run = testing.CliRunner().invoke
    found = {
        each["policy"]: each for each in json.loads(run(app, ["policies", "--json", "-"]).output)
    }
    assert found["quest"]["paper"] == "https://arxiv.org/abs/2406.10774"
    assert found["quest"]["query_agnostic"] is False
    shown = run(app, ["policies"]).output
    assert all(name in shown for name in found)
