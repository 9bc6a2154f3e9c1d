"""Damaged and hostile model folders by the hundred: each loads and runs, or is refused in one line, with little work."""

import gc
import resource
import shutil
import signal
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from odd_folders import MODELS, Case, odd_folder, write_models
from torch.nn.modules.module import register_module_parameter_registration_hook

from pecker_fast.errors import PeckerError, RecipeError
from pecker_fast.loading import load_model
from pecker_fast.networks import denoiser, single_file
from pecker_fast.networks.trial import trial_pass
from pecker_fast.recipe import recipe_from

LONGEST_LINE = 400
MOST_GROWTH = 600 << 20
HUNG_CPU_S = 60  # of this process alone: what others do on the machine does not count
CHUNKS, CHUNK, SLOW_CHUNKS = 10, 50, 90
# went wrong before values were checked: internal errors, three lines, minutes of building, NaN, or nothing said
KNOWN = {
    *(
        33,
        35,
        39,
        50,
        54,
        65,
        94,
        95,
        99,
        139,
        193,
        200,
        245,
        253,
        265,
        294,
        300,
        310,
        311,
        313,
        323,
        327,
        395,
        398,
        407,
    ),
    *(419, 427, 430, 433, 443, 463, 477, 487),
}
KNOWN_LATER = (823, 900, 1073, 1248, 1471, 1545, 1777, 1856, 2407)
FINE_NOW = {900, 1073}  # internal errors then: weights of eight bits, and a part beside the model that names nothing


class Hung(BaseException):
    """No Exception, so that nothing takes it for a damaged file."""


@dataclass
class Work:
    """What loading one folder came to."""

    line: str | None = None  # None = it loaded
    error: BaseException | None = None
    parameters: int = 0  # registered in modules, on any device
    growth: int = 0  # bytes of the process's peak memory


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("odd") / "models")


@pytest.fixture(scope="module")
def usual(models):
    """Work of loading the models in order, by name; collections afterwards look at what a case leaves alone."""
    patched = pytest.MonkeyPatch()
    for module in (denoiser, single_file):
        patched.setattr(module, "trial_pass", once_a_config(trial_pass))
    found = {model: work_of(Case(-1, model, models / model, "", "", "nothing")) for model in dict.fromkeys(MODELS)}
    assert not any(work.error or work.line for work in found.values()), found
    gc.collect()
    gc.freeze()
    yield found
    gc.unfreeze()
    patched.undo()


def once_a_config(trial):
    """The pass for shapes alone, the dearest part of loading, says the same of the same config every time."""
    passed = set()

    def run(network, where):
        what = repr(network.config)
        if what not in passed:
            trial(network, where)
            passed.add(what)

    return run


@contextmanager
def measured():
    work = Work()

    def count(*_):
        work.parameters += 1

    def hung(*_):
        raise Hung

    before, peak = signal.signal(signal.SIGVTALRM, hung), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hook = register_module_parameter_registration_hook(count)
    signal.setitimer(signal.ITIMER_VIRTUAL, HUNG_CPU_S)
    try:
        yield work
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        hook.remove()
        work.growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10


def work_of(case: Case) -> Work:
    with measured() as work:
        try:
            one_pass(case)
        except PeckerError as error:
            work.line = str(error)
            work.error = None if names_it(error, case) else error
        except (Exception, Hung) as error:
            work.error = error
    return work


@torch.no_grad()
def one_pass(case: Case) -> None:
    """Load it by the door of `train`, predict x_0 and make an image. Raises ArithmeticError where that is not finite."""
    teacher = load_model(recipe_from(case.recipe)).teacher
    noise = torch.randn(1, *teacher.sample_shape, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([min(500, teacher.schedule.num_timesteps - 1)])
    x_0 = teacher.x0(noise, t, torch.tensor([0]))
    if not bool(x_0.isfinite().all()) or not bool(teacher.to_images(x_0).isfinite().all()):
        raise ArithmeticError("it loads and draws what is not finite")


def names_it(error: PeckerError, case: Case) -> bool:
    """The folder's path or the key; a recipe that does not fit a model in order names its own key."""
    return (
        str(case.folder) in str(error) or (case.key != "" and case.key in str(error)) or isinstance(error, RecipeError)
    )


@dataclass
class Verdict:
    wrong: list[str] = field(default_factory=list)
    loaded: set[int] = field(default_factory=set)

    def add(self, case: Case, work: Work, usual: Work) -> None:
        if work.line is None:
            self.loaded.add(case.number)
        faults = {
            "raised": work.error is not None,
            "more than a line": work.line is not None and ("\n" in work.line or len(work.line) > LONGEST_LINE),
            "built too much": work.parameters > 4 * usual.parameters,
            "took memory": work.growth > MOST_GROWTH,
        }
        for fault, found in faults.items():
            if found:
                self.wrong.append(
                    f"{case}: {fault}: {work.error!r} {(work.line or '')[:300]} {work.parameters} {work.growth}"
                )


def judge(numbers, models, usual, tmp_path) -> Verdict:
    verdict = Verdict()
    for number in numbers:
        case = odd_folder(models, tmp_path, number)
        verdict.add(case, work_of(case), usual[case.model])
        shutil.rmtree(case.folder)
    return verdict


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_an_odd_folder_loads_or_is_refused_in_one_line(chunk, models, usual, tmp_path, capfd):
    verdict = judge(range(chunk * CHUNK, (chunk + 1) * CHUNK), models, usual, tmp_path)
    assert verdict.wrong == []
    assert 0 < len(verdict.loaded) < CHUNK / 2  # neither is everything refused, nor are the damages harmless
    assert not verdict.loaded & KNOWN
    assert "panicked" not in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS, CHUNKS + SLOW_CHUNKS))
def test_many_more_odd_folders(chunk, models, usual, tmp_path):
    assert judge(range(chunk * CHUNK, (chunk + 1) * CHUNK), models, usual, tmp_path).wrong == []


@pytest.mark.parametrize("number", KNOWN_LATER)
def test_what_went_wrong_before_among_later_cases(number, models, usual, tmp_path):
    verdict = judge([number], models, usual, tmp_path)
    assert (verdict.wrong, verdict.loaded - FINE_NOW) == ([], set())
