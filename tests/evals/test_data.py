"""lm-eval's own tasks in a sweep: the same documents for every policy and after every restart."""

from dataclasses import replace

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("wonderwords")
pytestmark = pytest.mark.filterwarnings("default")  # of lm-eval

from kvplug_evals.models.folder import write_word_tokenizer  # noqa: E402
from kvplug_evals.sweep import data, session  # noqa: E402
from kvplug_evals.sweep.settings import Setting, Suite  # noqa: E402


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_word_tokenizer(folder, ["?", "apple", "pear"])
    return Setting(
        engine="vllm",
        model=str(folder),
        policy="dense",
        tokens=1024,
        mode="multi-turn",
        question="aware",
        suite=Suite(name="mine", tasks={"ruler_cwe": {}, "ruler_vt": {}}),
    )


@pytest.mark.engine  # as slow as one: RULER draws 500 documents
@pytest.mark.timeout(900)
def test_documents_are_made_once_and_the_same_again(setting):
    (task,) = data.load("ruler_cwe", setting, {})
    (other,) = data.load("ruler_cwe", replace(setting, policy="knorm", mode="multi-request"), {})
    assert other is task, "made once for all policies"
    data._made.cache_clear()  # as in a sweep that is started again
    (again,) = data.load("ruler_cwe", setting, {})
    assert again is not task
    assert list(again.test_docs())[:3] == list(task.test_docs())[:3]


def test_lengths_that_ruler_never_finds_are_refused(setting):
    with pytest.raises(ValueError, match="ruler_vt needs --tokens 1024 or more, got 512"):
        data.load("ruler_vt", replace(setting, tokens=512), {})


def test_no_setting_reads_lm_evals_own_tasks_again(setting, monkeypatch):
    """A thousand files, which take as long as an engine to start."""
    import lm_eval

    given = {}
    monkeypatch.setattr(session, "load", lambda *asked: [])
    monkeypatch.setattr(
        lm_eval, "simple_evaluate", lambda lm, **options: given.update(options) or {"samples": {}}
    )
    assert session._evaluate(None, setting, "ruler_vt", {}) == {}
    assert given["task_manager"].all_tasks == []
