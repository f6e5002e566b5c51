"""tools/vllm_drift.py on two trees small enough to know what moved."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools/vllm_drift.py"

OLD = {
    "__init__.py": "from .engine import *\n",
    "engine.py": "class Engine:\n    def __init__(self, size): ...\n",
    "core/__init__.py": "",
    "core/planning.py": "def plan(groups, memory): ...\ndef hashes(blocks, size): ...\n",
    "core/manager.py": """
class Manager:
    '''What it says.'''
    limit = 4
    def __init__(self): self.rows = {}
    def look_up(self, request): return self.rows[request]
    def free(self, request): return self.rows.pop(request)
    def unrelated(self): ...
class Special(Manager):
    def free(self, request): return super().free(request)
class Gone: ...
""",
    "core/scheduler.py": """
class Scheduler:
    def step(self, request): return self.manager.look_up(request)
""",
    "backend.py": "class Backend:\n    def build(self, step): ...\n",
    "plugins.py": 'GROUP = "vllm.general_plugins"\ndef load(): raise\ndef other(): ...\n',
}
NEW = OLD | {
    "engine.py": "class Engine:\n    def __init__(self, size, *, watchdog=None): ...\n",
    "core/planning.py": "def hashes(blocks, size): ...\n",
    "core/builder.py": "def plan(groups, memory): ...\n",
    "core/manager.py": """
class Manager:
    '''Says it in other words.'''
    limit = 8
    draft: bool = False
    def __init__(self): self.rows = {}
    def look_up(self, request, length=None): return self.rows[request]
    def free(self, request): return list(self.rows.pop(request))
    def unrelated(self): ...
class Special(Manager):
    def free(self, request): return super().free(request)
""",
    "core/scheduler.py": """
class Scheduler:
    def step(self, request): return self.manager.look_up(request, 64)
    def warm_up(self): self.manager.free(0)
""",
    "backend.py": "class Backend:\n    bypass = True\n    def build(self, step): ...\n",
    "plugins.py": 'GROUP = "vllm.general_plugins"\ndef load(): print()\ndef other(): ...\n',
}
OURS = """
from vllm import Engine
from vllm.core.manager import Gone, Manager, Special
from vllm.core.planning import hashes, plan

def bases():
    from vllm.backend import Backend
    return (Backend,)

class Mixin:
    def free(self, request): return super().free(request)

class Ours(Mixin, Special):
    most = Special.limit

class Chosen(*bases()):
    def build(self, step): ...

def hook(look_up):
    Manager.look_up = look_up

SOURCE = "vllm.core.scheduler"
"""


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = folder / "vllm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def drift(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, TOOL, *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.fixture(scope="module")
def sections(tmp_path_factory) -> dict[str, str]:
    """Title of a section -> its text, with one space for any."""
    folder = tmp_path_factory.mktemp("drift")
    (folder / "ours").mkdir()
    (folder / "ours/adapter.py").write_text(OURS)
    old, new = write(folder / "old", OLD), write(folder / "new", NEW)
    done = drift(old, new, "--sources", folder / "ours", "--bodies")
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = {}
    for line in done.stdout.splitlines():
        if line and not line.startswith(" "):
            title = line
            found[title] = ""
        else:
            found[title] = " ".join(f"{found[title]} {line}".split())
    return {title.partition(",")[0].partition(":")[0]: text for title, text in found.items()}


def test_a_name_that_moved_is_gone_with_its_new_place(sections):
    gone = sections["Gone or moved"]
    assert "vllm.core.planning.plan [adapter.py] is gone; now in vllm.core.builder" in gone
    assert "vllm.core.manager.Gone [adapter.py] is gone; now in no module" in gone


def test_a_hooked_method_and_a_constructor_show_their_signatures(sections):
    called = sections["Called in another way"]
    assert "Manager.look_up [adapter.py] (self, request) -> (self, request, length=None)" in called
    assert "Engine.__init__ [adapter.py] (self, size) -> (self, size, *, watchdog=None)" in called
    assert "Manager.limit [adapter.py] = 4 -> = 8" in called


def test_what_a_base_class_gained_shows_also_where_a_function_names_the_bases(sections):
    gained = sections["New or gone in classes that ours derive from"]
    assert "Manager.draft [adapter.py] is new : bool = False" in gained
    assert "Backend.bypass [adapter.py] is new = True" in gained


def test_another_inside_of_what_a_mixin_of_ours_overrides_shows_through_super(sections):
    assert "Special.free [adapter.py] +1 -1 lines" in sections["Changed inside"]
    assert "+return list(self.rows.pop(request))" in sections["What changed inside"]


def test_new_callers_of_what_ours_override_or_hook_show(sections):
    calls = sections["vLLM calls what ours override or hook in another way or place"]
    assert (
        "look_up [adapter.py] now called in another way by vllm.core.scheduler.Scheduler.step: "
        "self.manager.look_up(request, 64)"
    ) in calls
    assert "free [adapter.py] now called by vllm.core.scheduler.Scheduler.warm_up" in calls


def test_what_loads_our_entry_points_shows_what_changed_in_it(sections):
    around = sections["Also changed inside"]
    assert "vllm.plugins loads our entry points: load" in around
    assert "other" not in around


def test_what_did_not_move_is_named_and_docstrings_are_no_change(sections):
    (same,) = [text for title, text in sections.items() if title.startswith("The same")]
    assert same == "hashes"
    assert "unrelated" not in " ".join(sections.values())


def test_a_version_equals_itself_as_a_wheel_and_unpacked(tmp_path):
    folder, wheel = write(tmp_path / "old", OLD), tmp_path / "vllm-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name, text in OLD.items():
            file.writestr(f"vllm/{name}", text)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/adapter.py").write_text(OURS)
    done = drift(wheel, folder, "--sources", tmp_path / "ours")
    assert done.stdout.startswith("The same, of 8 names:"), done.stdout + done.stderr


def test_a_folder_without_vllm_is_refused(tmp_path):
    done = drift(tmp_path, tmp_path)
    assert done.returncode != 0
    assert "holds no vllm/" in done.stderr
