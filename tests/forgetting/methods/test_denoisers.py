"""Methods that leave a model of many steps: loss and gradient against formulas in float64, draws, and what is refused."""

import copy

import pytest
import torch

from pecker_fast.engine import LocalEngine, begin_anchor, begin_pool
from pecker_fast.errors import RecipeError
from pecker_fast.forgetting import DenoiserObjective, make_pool, register, unregister
from pecker_fast.forgetting.methods import METHODS, check_method, get_method
from pecker_fast.loading.parts import load_parts
from pecker_fast.recipe import MethodKeys, recipe_from, recipe_to_dict
from pecker_fast.runs.start import train

DENOISERS = [name for name, method in METHODS.items() if isinstance(method, DenoiserObjective)]
SMALL = {"images": {"samples": 6, "steps": 3}, "batch_size": 4}


def began(recipe, moved=0.05):
    """(engine, state) at the start of forgetting, θ moved off φ so that no loss is zero."""
    parts = load_parts(recipe)
    engine = LocalEngine(recipe, parts.conditions, torch.device("cpu"))
    state = engine.start(parts.teacher, parts.score, parts.generator)
    begin_pool(engine, state)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, p in state.generator.named_parameters():
            p.add_(moved * torch.randn(p.shape, generator=g))
    engine.follow(state, None)
    return engine, state


def double(denoiser):
    """A copy whose weights and passes are float64."""
    other = denoiser.with_network(copy.deepcopy(denoiser.unet).double())
    other.schedule = copy.copy(denoiser.schedule)
    object.__setattr__(other.schedule, "a", denoiser.schedule.a.double())
    object.__setattr__(other.schedule, "b", denoiser.schedule.b.double())
    return other


def noise_of(denoiser, x, t, c):
    """ε(x_t, t, c) in float64, from the network's own output by the definition of its prediction type."""
    out = denoiser.unet(x, t, class_labels=c, return_dict=False)[0]
    a, b = (v[t].view(-1, 1, 1, 1) for v in (denoiser.schedule.a, denoiser.schedule.b))
    kind = denoiser.schedule.prediction_type
    return {"epsilon": out, "v_prediction": b * x + a * out, "sample": (x - a * out) / b}[kind]


def wanted(method, branch, phi, theta, batch, recipe):
    """The target of one branch as the papers have it."""
    x, t = batch.z.double(), batch.t_g

    def phi_of(c):
        return noise_of(phi, x, t, c)

    if method == "spare":
        return phi_of(batch.c_p)
    if method == "salun":
        return noise_of(theta, x, t, batch.c_p) if branch == "forget" else batch.e.double()
    if method == "sa":
        return batch.e.double()
    assert method == "esd"
    if branch == "retain":
        return phi_of(batch.c_g)
    empty = phi_of(torch.full_like(batch.c_g, phi.null_class))
    return empty - recipe.objective.eta * (phi_of(batch.c_g) - empty)


@pytest.mark.parametrize("method", DENOISERS)
@pytest.mark.parametrize("source", ["pool", "trajectory"])
def test_losses_and_gradients_are_the_formulas(tiny_recipe, method, source):
    if source == "trajectory" and METHODS[method].noisy:
        pytest.skip("refused, see below")
    keys = {"weights": {"retain": 0.7, "forget": 1.9}, "mask": {"source": "none"}, "objective": {"eta": 1.5}}
    recipe = tiny_recipe(method=method, **SMALL | {"images": {**SMALL["images"], "source": source}}, **keys)
    engine, state = began(recipe)
    inputs = engine.inputs(state)
    found, losses = engine.branch_gradients(state, {"retain": 0.7, "forget": 1.9}, separate=False, inputs=inputs)
    phi, theta = double(state.teacher), double(state.generator)
    total = 0.0
    for branch, weight in (("retain", 0.7), ("forget", 1.9)):
        batch = inputs.batches["generator", branch]
        answer = noise_of(theta, batch.z.double(), batch.t_g, batch.c_g)
        with torch.no_grad():
            target = wanted(method, branch, phi, theta, batch, recipe)
        loss = (answer - target).square().flatten(1).sum(1).mean()
        assert float(losses[f"{branch}_loss"]) == pytest.approx(float(loss), rel=1e-5)
        total = total + weight * loss
    parameters = [p for _, p in theta.named_parameters()]
    want = torch.autograd.grad(total, parameters, allow_unused=True)
    for mine, theirs in zip(found["sum"], want):
        if theirs is not None:
            assert (mine.double() - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6


@pytest.mark.parametrize("method", DENOISERS)
def test_samples_of_a_branch_are_noised_images_of_the_pool(tiny_recipe, method):
    recipe = tiny_recipe(
        method=method, forget=[0, 1], cover=[2, 2], **SMALL | {"images": {"samples": 6, "steps": 3, "source": "pool"}}
    )
    engine, state = began(recipe)
    for branch, batch in ((branch, engine.draw(state, "generator", branch)) for branch in ("forget", "retain")):
        a, b = (v[batch.t_g].view(-1, 1, 1, 1) for v in (state.teacher.schedule.a, state.teacher.schedule.b))
        clean = (batch.z.double() - b.double() * batch.e.double()) / a.double()
        pool = state.pool.images[branch].double()
        tolerance = 1e-5 / a.double().flatten()  # of the division
        distance = (clean[:, None] - pool[None]).flatten(2).norm(dim=2)
        nearest = distance.argmin(1)
        assert bool((distance.gather(1, nearest[:, None])[:, 0] <= 8 * tolerance + 1e-5).all())
        assert torch.equal(batch.c_g, state.pool.c[branch][nearest])
        assert set(batch.c_g.tolist()) <= ({0, 1} if branch == "forget" else {2})
        assert bool((batch.c_p == 2).all())
        assert torch.equal(batch.t, batch.t_g)


def test_a_pool_is_drawn_under_the_conditions_its_method_names(tiny_recipe, monkeypatch):
    asked = []

    def denoised(network, x, c, steps, guidance):
        asked.append((c.tolist(), steps, guidance))
        return x

    monkeypatch.setattr("pecker_fast.forgetting.pool.denoised", denoised)
    for method, under in (("spare", [0, 1, 0, 1, 0]), ("salun", [0] * 5), ("sa", [1] * 5)):
        asked.clear()
        recipe = tiny_recipe(method=method, images={"samples": 5, "steps": 7, "guidance": 1.5})
        parts = load_parts(recipe)
        pool = make_pool(recipe, parts.conditions, parts.teacher, get_method(method).pooled)
        assert asked[0] == (under, 7, 1.5)
        assert pool.c["forget"].tolist() == [0] * 5
        assert pool.covers["forget"].tolist() == [1] * 5
        assert pool.covers["retain"].tolist() == pool.c["retain"].tolist()
        again = make_pool(recipe, parts.conditions, parts.teacher, get_method(method).pooled)
        assert all(torch.equal(one, two) for one, two in zip(pool.tensors().values(), again.tensors().values()))
        other = recipe_from({**recipe_to_dict(recipe), "seed": 1})
        assert not torch.equal(
            make_pool(other, parts.conditions, parts.teacher, get_method(method).pooled).images["forget"],
            pool.images["forget"],
        )


def test_the_springs_pull_by_the_fisher_weight_of_kept_samples(tiny_recipe):
    recipe = tiny_recipe(method="sa", **SMALL, objective={"ewc": 3.0}, mask={"samples": 12, "exclude": ["conv_in.*"]})
    engine, state = began(recipe)
    state.generator.unet.requires_grad_(True)
    before, _ = engine.branch_gradients(state, {"retain": 1.0, "forget": 1.0}, separate=False)
    begin_anchor(engine, state)
    after, _ = engine.branch_gradients(state, {"retain": 1.0, "forget": 1.0}, separate=False)
    # F by hand: three batches of four kept samples at the weights of φ, in float64
    found = engine.saliency_pass(state)
    phi = double(state.teacher)
    phi.unet.requires_grad_(True)
    names = [name for name, _ in phi.named_parameters()]
    fisher = dict.fromkeys(names, 0.0)
    for index in range(3):
        batch = found._batch("retain", index)
        answer = noise_of(phi, batch.z.double(), batch.t_g, batch.c_g)
        loss = (answer - batch.e.double()).square().flatten(1).sum(1).mean()
        for name, g in zip(names, torch.autograd.grad(loss, [p for _, p in phi.named_parameters()], allow_unused=True)):
            fisher[name] = fisher[name] + (0 if g is None else g.square()) / 3
    theta, start = dict(state.generator.named_parameters()), dict(state.teacher.named_parameters())
    for name, g, old in zip(names, after["sum"], before["sum"]):
        want = 2 * 3.0 * fisher[name] * (theta[name].double() - start[name].double())
        assert ((g - (0 if old is None else old)).double() - want).norm() <= 1e-3 * want.norm() + 1e-6, name


def test_timesteps_are_drawn_where_concept_and_cover_differ(tiny_recipe):
    recipe = tiny_recipe(method="spare", **SMALL, objective={"crucial": True}, timesteps={"min": 100, "max": 900})
    engine, state = began(recipe)
    times = state.pool.times
    assert times.shape == (900,)
    assert not times[:100].any()
    assert bool((times[100:] > 0).all())
    assert float(times[100:].max() / times[100:].min()) > 1.05
    drawn = torch.cat([engine.draw(state, "generator", "forget").t for state.step in range(200)])
    assert int(drawn.min()) >= 100
    heavy = times >= times[100:].median()
    share, expected = float(heavy[drawn].float().mean()), float(times[heavy].sum() / times.sum())
    assert abs(share - expected) < 4 * (0.25 / len(drawn)) ** 0.5


def test_a_trajectory_stops_on_its_own_way(tiny_recipe):
    recipe = tiny_recipe(method="esd", batch_size=4, images={"source": "trajectory", "steps": 4})
    engine, state = began(recipe, moved=0)
    from pecker_fast.forgetting.samplers import ddim_scheduler

    seen = set()
    for state.step in range(12):
        batch = engine.draw(state, "generator", "forget")
        assert len(set(batch.t.tolist())) == 1
        seen.add(int(batch.t[0]))
    assert seen <= set(map(int, ddim_scheduler(state.generator, 4).timesteps))
    assert len(seen) > 1
    state.step = 0
    x = engine.draw(state, "generator", "forget")
    with torch.no_grad():
        state.generator.named_parameters()[0][1].add_(0.3)
    last = int(ddim_scheduler(state.generator, 4).timesteps[0])
    assert int(x.t[0]) == last or not torch.equal(engine.draw(state, "generator", "forget").z, x.z)


class Toy(DenoiserObjective):
    """θ answers the concept with nothing at all."""

    def target(self, recipe, networks, batch, branch):
        return torch.zeros_like(batch.z) if branch == "forget" else networks.teacher.eps(batch.z, batch.t_g, batch.c_g)


@pytest.fixture
def toy():
    register(
        "toy",
        Toy(),
        MethodKeys("answers with nothing", "denoiser", defaults={"steps": 3, "timesteps": {"min": 5, "max": 900}}),
    )
    yield
    unregister("toy")


def test_a_method_of_ones_own_takes_one_class(toy, tiny_recipe):
    recipe = tiny_recipe(method="toy", steps=3, mask={"density": 0.2, "samples": 8}, update_rule="salient_only")
    assert recipe.timesteps.min == 5
    result = train(recipe, quiet=True)
    assert result.metrics["outside_mask"]["weights"] > 0
    with pytest.raises(RecipeError, match="toy is taken"):
        register("toy", Toy(), MethodKeys("", "denoiser"))


def test_a_method_that_is_gone_is_unknown_again(toy):
    unregister("toy")
    with pytest.raises(RecipeError, match=r"method: expected one of pecker, sfd, spare.*got 'toy'"):
        recipe_from({"method": "toy"})


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"method": "spare", "generator": "digits"}, "generator: method spare makes a model of many steps"),
        ({"method": "salun", "distill_steps": 3}, "distill_steps: method salun makes a model of many steps"),
        ({"method": "esd", "score": "lora"}, "score: method esd"),
        ({"method": "sa", "engine": {"zero": 2}}, "engine.zero: the springs"),
        ({"method": "salun", "images": "trajectory"}, "images.source: method salun needs the noise"),
        ({"method": "sa", "images": "trajectory"}, "images.source: method sa needs the noise"),
        ({"method": "spare", "images": "trajectory"}, "mask.score: mse needs the noise in x_t"),
        (
            {"method": "spare", "mask": {"score": "forget_loss", "contrast": True}},
            "mask.contrast: with mask.score=forget_loss",
        ),
        ({"method": "spare", "mask": {"timesteps": "init"}}, "mask.timesteps: method spare has no one step"),
        ({"method": "spare", "adversary": {"conditions": 2, "half_way": 0.2}}, "adversary.half_way: method spare"),
        ({"method": "relabel", "adversary": {"conditions": 2}}, "adversary.conditions: method relabel"),
        (
            {"method": "esd", "mask": {"source": "names", "only": []}},
            "mask.only: mask.source=names needs tensors by name",
        ),
        ({"method": "esd"}, r"mask.only: .*attn2.* is no tensor of this model"),  # a class model has no cross-attention
        ({"method": "uce", "steps": 5}, "steps: method uce is in closed form"),
        ({"method": "uce"}, "uce edits cross-attention, and this model draws from classes"),
        ({"method": "relabel", "engine": {"zero": 1}}, "engine.zero: method relabel is in closed form"),
        ({"method": "saplun"}, "did you mean salun"),
    ],
)
def test_what_does_not_go_together_is_one_line(tiny_model, tmp_path, keys, says):
    with pytest.raises(RecipeError, match=says) as caught:
        train(recipe_from({"model": str(tiny_model), "output": str(tmp_path / "run"), **keys}), quiet=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def serves(name, keys):
    try:
        check_method(recipe_from({"method": name, **keys}))
    except RecipeError as error:
        return not str(error).startswith(f"method: {name}")
    return True


def test_every_method_says_from_the_recipe_alone_what_it_serves():
    kinds = {"classes": {}, "prompts": {"model": "shapes", "forget": "circle", "cover": "square"}}
    served = {name: {kind for kind, keys in kinds.items() if serves(name, keys)} for name in METHODS}
    one_kind = {"uce": {"prompts"}, "relabel": {"classes"}}
    assert served == {name: one_kind.get(name, set(kinds)) for name in METHODS}
