"""One iteration of the engine against the formulas: which gradients, which weights, in which order."""

import copy

import pytest
import torch

from pecker_fast.errors import NonFiniteError
from pecker_fast.forgetting.losses import generate, generator_loss, noise_loss
from pecker_fast.forgetting.updates import Dense


def branch_loss(recipe, engine, state, branch):
    b = engine.draw(state, "generator", branch)
    x_g = generate(state.generator, b.z, b.c_g, recipe.timesteps.init)
    return generator_loss(state.teacher, state.score, x_g, b.e, b.t, b.c_g, b.c_p, alpha=recipe.alpha).mean()


def branch_gradient(recipe, engine, state, branch):
    """∇_θ of one branch's loss, the whole graph in one piece."""
    parameters = [p for _, p in state.generator.named_parameters()]
    return torch.autograd.grad(branch_loss(recipe, engine, state, branch), parameters)


def weights(denoiser):
    return [p.detach().clone() for _, p in denoiser.named_parameters()]


def assert_close(got, want, tolerance=1e-4):
    got, want = torch.cat([g.flatten() for g in got]), torch.cat([w.flatten() for w in want])
    assert float((got - want).norm() / want.norm()) < tolerance


# eps = 1 makes Adam's first step −lr · g / (|g| + 1): smooth in g, so that a wrong gradient shows in proportion
LINEAR = {"optimizer": {"eps": 1.0, "clip_value": None}, "lr": 1e-2, "weights": {"retain": 0.7, "forget": 0.3}}


def first_adam_step(p, g, lr=1e-2):
    return p - lr * g / (g.abs() + 1)


@pytest.mark.parametrize("separate", [True, False])
def test_gradients_cut_at_x_g_equal_the_whole_graph(setup, separate):
    recipe, engine, state, _ = setup(weights={"retain": 0.7, "forget": 0.3}, mask={"skip": False})
    want = {b: branch_gradient(recipe, engine, state, b) for b in ("retain", "forget")}
    gradients, losses = engine.branch_gradients(state, {"retain": 0.7, "forget": 0.3}, separate)
    if separate:
        assert_close(gradients["retain"], [0.7 * g for g in want["retain"]])
        assert_close(gradients["forget"], [0.3 * g for g in want["forget"]])
    else:
        assert_close(gradients["sum"], [0.7 * r + 0.3 * f for r, f in zip(want["retain"], want["forget"])])
    for branch in ("retain", "forget"):
        assert float(losses[f"{branch}_loss"]) == pytest.approx(
            branch_loss(recipe, engine, state, branch).item(), rel=1e-4
        )


def test_differentiated_is_one_dense_step_on_retain_plus_masked_forget(setup):
    recipe, engine, state, mask = setup(**LINEAR)
    g_r, g_f = (branch_gradient(recipe, engine, state, b) for b in ("retain", "forget"))
    names = [name for name, _ in state.generator.named_parameters()]
    start = weights(state.generator)
    want = [first_adam_step(p, 0.7 * r + mask.bool(n) * 0.3 * f) for n, p, r, f in zip(names, start, g_r, g_f)]
    engine.generator_step(state)
    got = weights(state.generator)
    assert_close([a - b for a, b in zip(got, start)], [a - b for a, b in zip(want, start)], 1e-3)
    unmasked = [first_adam_step(p, 0.7 * r + 0.3 * f) for p, r, f in zip(start, g_r, g_f)]
    with pytest.raises(AssertionError):  # the gate sees a mask that is ignored
        assert_close([a - b for a, b in zip(got, start)], [a - b for a, b in zip(unmasked, start)], 1e-3)


def test_salient_only_steps_the_mask_and_nothing_else(setup):
    _recipe, engine, state, mask = setup(
        update_rule="salient_only", **{**LINEAR, "optimizer": {"eps": 1.0, "weight_decay": 0.1, "clip_value": None}}
    )
    start = weights(state.generator)
    for _ in range(3):
        engine.generator_step(state)
        state.step += 1
    for (name, p), before in zip(state.generator.named_parameters(), start):
        outside = ~mask.bool(name)
        assert torch.equal(p.detach()[outside], before[outside])
    assert any(not torch.equal(p.detach(), before) for (_, p), before in zip(state.generator.named_parameters(), start))


def test_salient_only_first_step_follows_both_branches(setup):
    recipe, engine, state, mask = setup(update_rule="salient_only", **LINEAR)
    g_r, g_f = (branch_gradient(recipe, engine, state, b) for b in ("retain", "forget"))
    names = [name for name, _ in state.generator.named_parameters()]
    start = weights(state.generator)
    engine.generator_step(state)
    moved = [mask.bool(n) * (first_adam_step(p, 0.7 * r + 0.3 * f) - p) for n, p, r, f in zip(names, start, g_r, g_f)]
    assert_close([a - b for a, b in zip(weights(state.generator), start)], moved, 1e-3)


def test_alternating_is_a_masked_forget_step_then_a_full_retain_step(setup):
    recipe, engine, state, mask = setup(update_rule="alternating", **LINEAR)
    names = [name for name, _ in state.generator.named_parameters()]
    start = weights(state.generator)
    g_f = branch_gradient(recipe, engine, state, "forget")
    middle = [torch.where(mask.bool(n), first_adam_step(p, 0.3 * f), p) for n, p, f in zip(names, start, g_f)]
    there = copy.copy(state)
    there.generator = state.generator.clone()
    with torch.no_grad():
        for (_, p), value in zip(there.generator.named_parameters(), middle):
            p.copy_(value)
    g_r = branch_gradient(recipe, engine, there, "retain")  # at the weights the forget step left behind
    want = [first_adam_step(p, 0.7 * r) for p, r in zip(middle, g_r)]
    engine.generator_step(state)
    assert_close([a - b for a, b in zip(weights(state.generator), start)], [a - b for a, b in zip(want, start)], 1e-3)
    forget, retain = state.updates.optimizers["generator_forget"], state.updates.optimizers["generator_retain"]
    assert forget is not retain
    assert forget.mask is not None
    assert retain.mask is None


def test_sfd_and_no_mask_are_the_same_dense_step(setup):
    results = []
    for keys in ({"method": "sfd"}, {"method": "pecker", "mask": {"source": "none"}}):
        _, engine, state, _ = setup(density=None, **keys)
        assert isinstance(state.updates, Dense)
        engine.generator_step(state)
        results.append(weights(state.generator))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_each_step_writes_its_own_network_only(setup):
    _, engine, state, _ = setup()
    teacher, score, generator = weights(state.teacher), weights(state.score), weights(state.generator)
    engine.score_step(state)
    assert all(torch.equal(a, b) for a, b in zip(weights(state.generator), generator))
    assert any(not torch.equal(a, b) for a, b in zip(weights(state.score), score))
    score = weights(state.score)
    engine.generator_step(state)
    assert all(torch.equal(a, b) for a, b in zip(weights(state.score), score))
    assert any(not torch.equal(a, b) for a, b in zip(weights(state.generator), generator))
    assert all(torch.equal(a, b) for a, b in zip(weights(state.teacher), teacher))
    assert all(p.grad is None for _, p in state.teacher.named_parameters())
    assert all(p.requires_grad for _, p in state.score.named_parameters())


def test_score_step_weighs_its_branches(setup):
    recipe, engine, state, _ = setup(
        weights={"score_retain": 0.9, "score_forget": 0.2}, optimizer={"eps": 1.0, "clip_value": None}, lr=1e-2
    )
    total = 0.0
    for branch, weight in (("retain", 0.9), ("forget", 0.2)):
        b = engine.draw(state, "score", branch)
        with torch.no_grad():
            x_g = generate(state.generator, b.z, b.c_g, recipe.timesteps.init)
        x_t = state.score.schedule.add_noise(x_g, b.e, b.t)
        total = total + weight * noise_loss(state.score.eps, x_t, b.e, b.t, b.c_g).mean()
    start = weights(state.score)
    grads = torch.autograd.grad(total, [p for _, p in state.score.named_parameters()])
    losses = engine.score_step(state)
    assert float(losses["score_loss"]) == pytest.approx(total.item(), rel=1e-5)
    moved = [first_adam_step(p, g) - p for p, g in zip(start, grads)]
    assert_close([a - b for a, b in zip(weights(state.score), start)], moved, 1e-3)


def test_forget_branch_draws_forget_and_cover(setup):
    _, engine, state, _ = setup(forget=[0, 2], cover=[1, 1])
    b = engine.draw(state, "generator", "forget")
    assert set(b.c_g.tolist()) <= {0, 2}
    assert set(b.c_p.tolist()) == {1}
    r = engine.draw(state, "generator", "retain")
    assert set(r.c_g.tolist()) == {1}
    assert torch.equal(r.c_g, r.c_p)


def test_value_clipping_bounds_the_gradient(setup):
    _recipe, engine, state, _ = setup(optimizer={"eps": 1.0, "clip_value": 1e-3}, lr=1e-2)
    start = weights(state.generator)
    engine.generator_step(state)
    largest = max(float((a - b).abs().max()) for a, b in zip(weights(state.generator), start))
    assert 0 < largest <= 1e-2 * 1e-3 / (1e-3 + 1) * 1.01


def test_zero_weight_skips_a_branch(setup):
    _, engine, state, _ = setup(weights={"forget": 0, "score_forget": 0})
    assert set(engine.score_step(state) | engine.generator_step(state)) == {"score_loss", "retain_loss"}
    assert state.images == 2 * engine.recipe.batch_size


def test_ema_warms_up(setup):
    _, _, state, _ = setup()
    start = {k: v.clone() for k, v in state.ema.items()}
    with torch.no_grad():
        for _, p in state.generator.named_parameters():
            p.add_(1.0)
    state.step = 8  # d = 9/18
    state.update_ema(0.98)
    for name, value in state.ema.items():
        assert torch.allclose(value, start[name] + 0.5, atol=1e-6)


def test_non_finite_gradient_stops_before_any_weight_is_written(setup):
    _, engine, state, _ = setup()
    with torch.no_grad():
        state.teacher.unet.conv_out.bias.fill_(float("nan"))
    start = weights(state.generator)
    with pytest.raises(NonFiniteError, match=r"step 0.*generator tensor"):
        engine.generator_step(state)
    assert all(torch.equal(a, b) for a, b in zip(weights(state.generator), start))


def test_saliency_of_the_forgetting_loss_leaves_the_score_network_alone(setup):
    """Gradients flow through ψ to θ: ψ gets none of its own, and is trainable again afterwards."""
    _, engine, state, _ = setup(mask={"score": "forget_loss", "contrast": True, "density": 0.3})
    before = weights(state.generator)
    mask = engine.make_mask(state)
    assert mask.count == round(0.3 * mask.total)
    assert all(p.grad is None and p.requires_grad for _, p in state.score.named_parameters())
    assert all(p.grad is None for _, p in state.generator.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights(state.generator), before))
