"""`audit` from the command line and from Python, over a tiny run: what it writes, takes up, and refuses."""

import re
import shutil

import pytest
from small_runs import copied, small_recipe, small_run
from tiny_models import TINY_KEYS, write_tiny_model

from pecker_fast import cli, unlearn
from pecker_fast.audit import AUDIT, BUDGETS, PROBES, Budget, read_audit
from pecker_fast.errors import PeckerError
from pecker_fast.recipe import recipe_to_yaml
from pecker_fast.runs import train

LEAST = Budget(
    "quick", samples=20, images=8, steps=2, batch=2, starts=2, noise_images=4, noise_steps=2, relearn_images=(1,),
    relearn_steps=2, relearn_batch=2, sampler_steps=2,
)  # fmt: skip
FEW = "condition,neighbours"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(the model, a run of it, a model that has a one-step generator), made once."""
    home = tmp_path_factory.mktemp("audited")
    model = write_tiny_model(home / "model")
    other = write_tiny_model(home / "other", seed=1)
    shutil.copytree(other / "unet", other / "generator")
    return model, small_run(model, home / "run"), other


@pytest.fixture(autouse=True)
def least(monkeypatch):
    monkeypatch.setitem(BUDGETS, "quick", LEAST)
    monkeypatch.setattr("pecker_fast.report.figures._svg", lambda figure, name, label: "<svg></svg>")


def audit(*words):
    return cli.main(["audit", *map(str, words), "--budget", "quick"])


def test_all_probes_of_a_run(made, tmp_path, capsys):
    _, run, other = made
    run = copied(run, tmp_path)
    assert audit(run, "--against", other, "--json", tmp_path / "found.json") == 0
    record = read_audit(run / AUDIT)
    assert record["complete"] is True
    assert list(record["probes"]) == list(PROBES)
    for name, found in record["probes"].items():
        assert set(found["figures"]) == {"result", "before", "relabel", "never knew"}, name
        assert found["verdict"] in ("holds", "as if never known", "hides", "cannot tell", "kept", "lost")
    out = capsys.readouterr().out
    assert "comes back under attack" in out
    assert record["verdict"] in out
    page = (run / "report.html").read_text()
    assert "Hidden or forgotten" in page
    assert len(list((run / "audit").glob("*.png"))) == 4 * len(PROBES)


def test_what_is_on_record_is_not_done_again(made, tmp_path, monkeypatch):
    run = copied(made[1], tmp_path)
    assert audit(run, "--probes", FEW, "-q") == 0
    monkeypatch.setattr("pecker_fast.audit.audit.Audit.unit", None)
    assert audit(run, "--probes", FEW, "-q") == 0
    assert train(small_recipe(made[0], run, resume="never", steps=2), quiet=True).run_dir == run
    assert not (run / AUDIT).exists()  # figures of another result


def test_at_the_end_of_a_training_and_from_python(made, tmp_path):
    keys = {**TINY_KEYS, "evaluate": {"every": 0, "samples": 8, "final": 12, "teacher_steps": 2}}
    keys = {key: value for key, value in keys.items() if key not in ("forget", "cover")}
    given = {"budget": "quick", "probes": ["neighbours"], "against": [str(made[2])]}
    result = unlearn(str(made[0]), 0, 1, output=tmp_path / "run", audit=given, **keys)
    assert result.audit["probes"]["neighbours"]["verdict"] in ("kept", "lost")
    assert read_audit(tmp_path / "run" / AUDIT) == result.audit


def test_a_folder_of_somebody_else(made, tmp_path):
    """A one-step pipeline says so of itself and is audited as one; an ordinary denoiser by its many steps."""
    model, run, _ = made
    recipe = tmp_path / "what.yaml"
    recipe.write_text(recipe_to_yaml(small_recipe(model, tmp_path / "nowhere")))
    for folder, t_init in ((run / "pipeline", 440), (model, None)):
        into = tmp_path / f"audit-{t_init}"
        assert audit(folder, "--recipe", recipe, "--output", into, "--probes", FEW, "-q") == 0
        assert read_audit(into / AUDIT)["identity"]["subjects"]["result"]["t_init"] == t_init


@pytest.mark.slow
def test_a_model_that_knew_what_is_forgotten_is_no_floor(made, tmp_path, capsys):
    model, run, other = made
    twin = copied(other, tmp_path)
    (twin / "model.json").write_text('{"null_class": 3, "without": [2]}')
    assert audit(run, "--against", twin, "--probes", FEW) == 2
    assert "it was made without 2, and knows 0; give one made with" in capsys.readouterr().err
    given = {"budget": "quick", "probes": ["neighbours"], "against": [str(twin)]}
    result = train(small_recipe(model, tmp_path / "run", audit=given), quiet=True)
    assert "is left out: it was made without 2" in capsys.readouterr().err
    assert set(result.audit["identity"]["subjects"]) == {"result", "before", "relabel"}
    given["against"] = ["digits_without_0"]  # as a shipped recipe has it that is given another model
    train(small_recipe(model, tmp_path / "own", audit=given), quiet=True)
    assert "is left out: against digits_without_0: its network is another model's" in capsys.readouterr().err
    (twin / "model.json").write_text('{"null_class": 3, "without": [0]}')
    assert audit(copied(run, tmp_path / "again"), "--against", twin, "--probes", "neighbours", "-q") == 0


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"audit": {"budget": "quick", "probes": ["relern"]}}, "did you mean relearn?"),
        ({"audit": {"budget": "quick", "against": ["runs/at-all"]}}, "no such model folder"),
        ({"audit": {"budget": "quick"}, "distill_steps": 1}, "distils its own start"),
    ],
)
def test_an_audit_that_could_not_be_made_is_refused_before_training(made, tmp_path, keys, said):
    with pytest.raises(PeckerError, match=re.escape(said)):
        train(small_recipe(made[0], tmp_path / "run", **keys), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("RUN", "--probes", "conditions"), "probes: 'conditions' is unknown, did you mean condition?"),
        (("RUN", "--against", "MODEL"), "it has no one-step generator"),
        (("RUN", "--against", "runs/at-all"), "no such model folder"),
        (("RUN", "--prompts", "RUN/recipe.yaml"), "reads no words"),
        (("RUN", "--recipe", "digits"), "a run folder has its own"),
        (("MODEL",), "not a run folder"),
        (("RUN", "--probes", ","), "expected names such as condition,relearn"),
    ],
)
def test_refusals_of_one_line(made, words, said, capsys):
    model, run, _ = made
    assert audit(*(word.replace("RUN", str(run)).replace("MODEL", str(model)) for word in words)) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") <= 2
    assert "Traceback" not in err


def test_an_unknown_budget(made, capsys):
    assert cli.main(["audit", str(made[1]), "--budget", "quik"]) == 2
    assert "did you mean quick?" in capsys.readouterr().err
