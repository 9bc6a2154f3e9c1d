"""One process: a score step and a generator step, branches batched through the networks they share."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from pecker_kernels import SaliencyMask, SparseBackward
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pecker_fast.conditions import Conditions
from pecker_fast.engine.adversary import Attacks
from pecker_fast.engine.blocks import compile_blocks
from pecker_fast.engine.finite import FiniteGuard, non_finite
from pecker_fast.engine.graph import IterationGraph, require_gpu
from pecker_fast.engine.inputs import Inputs, draw
from pecker_fast.engine.live import LiveBackward, gradients_of
from pecker_fast.engine.pieces import add_gradients, split, total, weighted_mean
from pecker_fast.engine.state import TrainState, start_ema
from pecker_fast.forgetting import (
    Attack,
    Batch,
    Dense,
    ForgetImages,
    Gradients,
    Networks,
    SaliencyPass,
    adam,
    concatenate,
    generate,
    get_method,
    noise_loss,
)
from pecker_fast.machine import part
from pecker_fast.machine.ranks import ALONE, Ranks
from pecker_fast.networks import Denoiser
from pecker_fast.recipe import Recipe


class LocalEngine:
    """Runs the two steps of an iteration on one device. Branch weights of zero skip the branch.

    From `inputs` on nothing waits for the device. late: how gradients that are not finite are met, see FiniteGuard; None =
    late on a GPU, at once on the CPU. Raises RecipeError where the recipe asks for what the device does not have.
    """

    sharded = False  # whether weights are spread over ranks

    def __init__(
        self,
        recipe: Recipe,
        conditions: Conditions,
        device: torch.device,
        late: bool | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        require_gpu(recipe, device)
        if recipe.engine.threads:
            torch.set_num_threads(recipe.engine.threads)
        self.recipe = recipe
        self.conditions = conditions
        self.device = device
        self.guard = FiniteGuard(device, late=device.type != "cpu" if late is None else late)
        self.live = LiveBackward(recipe.mask.skip)
        self.objective = get_method(recipe.method)
        self.attacks = Attacks(recipe, conditions, self)
        self.graph = IterationGraph() if recipe.engine.cuda_graph else None
        self._compiled: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The recipe's precision for the networks' passes."""
        if self.recipe.precision == "fp32":
            yield
            return
        with torch.autocast(self.device.type, dtype=torch.bfloat16), self.attention():
            yield

    def attention(self) -> AbstractContextManager[object]:
        """The kernel of attention, for passes and their way back: checkpointing remembers precision by itself and passes
        forward again with whatever kernel is chosen then."""
        if self.recipe.precision == "fp32" or self.device.type != "cpu":
            return nullcontext()
        return sdpa_kernel(SDPBackend.MATH)  # in bfloat16 torch's fused one is six times slower there than in float32

    # -- the stages of a run ----------------------------------------------------------------------------------------

    def start(
        self, teacher: Denoiser, score: Denoiser | None, generator: Denoiser, stage: str = "forget"
    ) -> TrainState:
        """φ, ψ, θ on the device with fresh optimizers, no mask yet."""
        teacher, generator = teacher.to(self.device), generator.to(self.device)
        score = None if score is None else score.to(self.device)
        return TrainState(
            teacher, score, generator,
            None if score is None else adam(self.recipe, score.named_parameters(), self.recipe.lr.score),
            Dense(self.recipe, generator.named_parameters(), None), start_ema(generator, self.recipe.ema), stage=stage,
        )  # fmt: skip

    def forget_stage(self, state: TrainState) -> TrainState:
        """From the distilled (or given) θ to the forget stage: the average becomes θ, ψ stays, fresh optimizers."""
        generator = state.averaged_generator() if state.stage == "distill" else state.generator
        generator.unet.requires_grad_(True)
        state.release()
        fresh = self.start(state.teacher, state.score, generator)
        for name in ("images", "training_s", "flops", "flops_per_iteration", "pool"):
            setattr(fresh, name, getattr(state, name))
        return fresh

    def follow(self, state: TrainState, mask: SaliencyMask | None) -> None:
        """Give θ the fresh optimizers of the recipe's rule under a mask."""
        state.limit(mask)
        named = state.generator.named_parameters()
        state.updates = self.objective.updates(self.recipe, named, mask)

    def set_mask(self, state: TrainState, mask: SaliencyMask) -> None:
        """Go on with another mask; moments follow the weights that stay."""
        state.updates.set_mask(mask)

    def saliency_pass(
        self,
        state: TrainState,
        forget_images: ForgetImages | None = None,
        poll: Callable[[], object] = lambda: None,
    ) -> SaliencyPass:
        """The pass over the present weights that a mask is cut from."""
        return SaliencyPass(
            self.recipe, state.teacher, state.score, state.whole_generator(), self.conditions, state.step, forget_images,
            poll, state.pool,
        )  # fmt: skip

    def make_mask(
        self,
        state: TrainState,
        forget_images: ForgetImages | None = None,
        poll: Callable[[], object] = lambda: None,
    ) -> SaliencyMask | None:
        """The recipe's mask at the present weights. Takes all ranks."""
        with self.autocast():
            return self.saliency_pass(state, forget_images, poll).mask()

    def averaged(self, state: TrainState) -> Denoiser | None:
        """A frozen θ with the averaged weights, where figures are made: on rank 0. Takes all ranks."""
        return state.averaged_generator()

    def means(self, losses: dict[str, Tensor]) -> dict[str, float]:
        """The losses over all ranks, as numbers."""
        return {name: float(loss) for name, loss in losses.items()}

    # -- around the iteration ---------------------------------------------------------------------------------------

    def inputs(self, state: TrainState) -> Inputs:
        """Get ready for one iteration: this step's learning rates, and all its draws."""
        self._compile(state)
        state.set_learning_rates(self.recipe.lr, self.device if self.graph is not None else None)
        self.guard.arm(state.optimizers.values())
        self.attacks.restart(state)
        batches = {
            (role, branch): self.draw(state, role, branch)
            for role in (("score", "generator") if self.recipe.one_step else ("generator",))
            for branch in self.branch_weights(state.stage, role)
        }
        attacks = self.attacks.draw(state)
        if not self.guard.late:
            return Inputs(batches, attacks)
        return Inputs(batches, attacks, torch.full((), 1 - state.ema_decay(self.recipe.ema), device=self.device))

    def launch(
        self, body: Callable[["LocalEngine", TrainState, Inputs], dict[str, Tensor]], state: TrainState, inputs: Inputs
    ) -> dict[str, Tensor]:
        """Run the steps of an iteration, as one CUDA graph where the recipe asks for that."""
        if self.graph is None:
            return body(self, state, inputs)
        return self.graph(lambda given: body(self, state, given), state, inputs)

    def average(self, state: TrainState, inputs: Inputs) -> None:
        """The moving average follows θ; with a gradient that was not finite it stands still, as θ does."""
        if inputs.ema_weight is None:
            state.update_ema(self.recipe.ema)
        else:
            state.blend_ema(inputs.ema_weight * (self.guard.flag == 0))

    def look(self, state: TrainState) -> None:
        """After an iteration. Raises NonFiniteError if the one before it met a gradient that was not finite."""
        self.guard.record(state.step - 1)
        self._raise_failed(state, behind=1)

    def settle(self, state: TrainState) -> None:
        """Wait for the iterations so far, before their weights are used. Raises NonFiniteError as `look` does."""
        self._raise_failed(state, behind=0)

    def _raise_failed(self, state: TrainState, behind: int) -> None:
        """Since the failed update nothing was written, and draws follow from seed and step: made again, the gradient
        tells which tensor it was."""
        failed = self.guard.failed(behind)
        if failed is None:
            return
        state.step, update = failed
        with self.guard.at_once():
            self.score_step(state) if update == 1 else self.generator_step(state)
        raise non_finite(f"{state.stage} step {state.step}", "the score network" if update == 1 else "the generator")

    def uncompiled(self) -> AbstractContextManager[object]:
        """Inside, compiled blocks run as they are written, so that every operation can be seen."""
        compiled = self.recipe.engine.compile != "none"
        return torch.compiler.set_stance("force_eager") if compiled else nullcontext()

    def _compile(self, state: TrainState) -> None:
        if self.recipe.engine.compile == "none":
            return
        for network in (one.unet for one in state.networks_by_name.values()):
            if network not in self._compiled:
                compile_blocks(network)
                self._compiled.add(network)

    # -- the steps --------------------------------------------------------------------------------------------------

    @part("draws")
    def draw(self, state: TrainState, role: str, branch: str) -> Batch:
        """Draws of one branch of one step of the present iteration; see inputs.draw."""
        return draw(self.recipe, self.conditions, state, role, branch, self.device, self.objective)

    def batches(
        self, state: TrainState, role: str, weights: dict[str, float], inputs: Inputs | None
    ) -> dict[str, Batch]:
        """Branch -> draws, from the inputs of the iteration or fresh ones (the same)."""
        if inputs is None:
            return {branch: self.draw(state, role, branch) for branch in weights}
        return {branch: inputs.batches[role, branch] for branch in weights}

    def branch_weights(self, stage: str, role: str) -> dict[str, float]:
        """Branch -> coefficient; plain distillation has one branch over all classes."""
        w = self.recipe.weights
        retain, forget = (w.score_retain, w.score_forget) if role == "score" else (w.retain, w.forget)
        weights = {"all": retain} if stage == "distill" else {"retain": retain, "forget": forget}
        return {branch: weight for branch, weight in weights.items() if weight != 0}

    def own_vectors(self, network: Denoiser, c: Tensor) -> Tensor:
        return network.own_vectors(c)

    def share_of(self, attack: Attack) -> Attack:
        return attack

    def sum_of(self, state: TrainState, gradient: Tensor) -> Tensor:
        # late, θ's own gradients are not finite either
        self.guard.check(f"{state.stage} step {state.step}", "adversary", [gradient], [("values", gradient)])
        return gradient

    def score_step(self, state: TrainState, inputs: Inputs | None = None) -> dict[str, Tensor]:
        """ψ learns θ's distribution: L_ψ = s_r mean_n ℓ(retain) + s_f mean_n ℓ(forget), θ under no_grad."""
        score = state.score
        if score is None:
            return {}
        weights = self.branch_weights(state.stage, "score")
        whole = list(self.batches(state, "score", weights, inputs).values())
        pieces = split(whole, self.recipe.engine.micro_batch)
        losses = []
        guidance = self.recipe.guidance.score_train

        def eps(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            return score.eps(x, t, c, guidance)

        with self.attention(), self.score_update(state, len(pieces)) as backward:
            for share, piece in pieces:
                batch = concatenate(piece)
                with self.autocast():
                    with torch.no_grad(), part("score_samples"):
                        x_g = generate(self.attacks.drawing(state), batch.z, batch.c_g, batch.t_g)
                    x_t = state.teacher.schedule.add_noise(x_g, batch.e, batch.t)
                    with part("score_forward"):
                        per_sample = noise_loss(eps, x_t, batch.e, batch.t, batch.c_s)
                loss = share * weighted_mean(per_sample, weights)
                with part("score_backward"):
                    backward(loss)
                losses.append(loss.detach())
                state.images += per_sample.shape[0] * self.ranks.world
        return {"score_loss": total(losses)}

    @contextmanager
    def score_update(self, state: TrainState, passes: int) -> Iterator[Callable[[Tensor], object]]:
        """Yields what takes the loss of each of the passes back; ends with ψ's step on the sum of their gradients."""
        assert state.score is not None
        assert state.score_optimizer is not None
        state.score_optimizer.zero_grad()
        yield Tensor.backward
        named = state.score.named_parameters()
        self.guard.check(f"{state.stage} step {state.step}", "score network", [p.grad for _, p in named], named)
        with part("score_optimizer"):
            state.score_optimizer.step()
        self.guard.note(state.score_optimizer, 1)
        state.score_optimizer.zero_grad()

    def generator_step(self, state: TrainState, inputs: Inputs | None = None) -> dict[str, Tensor]:
        """θ: the phases of the update rule in order, each at the weights the one before left behind."""
        weights = self.branch_weights(state.stage, "generator")
        losses: dict[str, Tensor] = {}
        frozen = nullcontext() if state.score is None else state.score.frozen()
        with self.attention(), frozen:  # the gradient flows through ψ to x_t
            phases = (tuple(weights),) if state.stage == "distill" else state.updates.phases
            for update, phase in enumerate(phases, start=2):
                branches = {branch: weights[branch] for branch in phase if branch in weights}
                if branches:
                    losses |= self.generator_update(state, phase, branches, update, inputs)
        return losses

    def generator_update(
        self, state: TrainState, phase: tuple[str, ...], weights: dict[str, float], update: int, inputs: Inputs | None
    ) -> dict[str, Tensor]:
        """Gradients of the branches of one phase, and the step they end in; its number counts from 2."""
        gradients, values = self.branch_gradients(state, weights, state.updates.separate, inputs)
        with part("generator_optimizer"):
            optimizer = state.updates.apply(phase, gradients)
        self.guard.note(optimizer, update)
        for p in state.updates.parameters:
            p.grad = None
        return values

    def branch_gradients(
        self, state: TrainState, weights: dict[str, float], separate: bool, inputs: Inputs | None = None
    ) -> tuple[dict[str, Gradients], dict[str, Tensor]]:
        """(gradients of θ, losses by branch). One pass of φ and ψ serves all branches; θ is differentiated per branch
        if `separate`.

        The chain rule is cut at x_g: dL/dx_g comes from the shared pass, then each branch goes back through θ alone. Of
        branches that the mask limits only live weights have gradients, in MaskedAdam's compact form.
        """
        named = state.generator.named_parameters()
        whole = self.batches(state, "generator", weights, inputs)
        gradients: dict[str, Gradients] = {}
        values: dict[str, list[Tensor]] = {}
        for share, piece in split(list(whole.values()), self.recipe.engine.micro_batch):
            shares = {branch: share * weight for branch, weight in weights.items()}
            found, means = self._piece_gradients(state, dict(zip(whole, piece)), shares, separate)
            gradients = {key: add_gradients(gradients.get(key), grads) for key, grads in found.items()}
            for branch, mean in means.items():
                values.setdefault(branch, []).append(share * mean)
        if state.anchor is not None:
            key = "retain" if separate else "sum"
            gradients[key] = state.anchor.pull(self.recipe.objective.ewc, gradients.get(key))
        for grads in gradients.values():
            self.guard.check(f"{state.stage} step {state.step}", "generator", grads, named)
        if separate:  # a branch of weight zero has no gradient at all
            gradients = {branch: gradients.get(branch, [None] * len(named)) for branch in ("retain", "forget")}
        return gradients, {("retain" if b == "all" else b) + "_loss": total(found) for b, found in values.items()}

    def _piece_gradients(
        self, state: TrainState, batches: dict[str, Batch], weights: dict[str, float], separate: bool
    ) -> tuple[dict[str, Gradients], dict[str, Tensor]]:
        """(gradients, mean losses) of what passes the networks at once."""
        groups = [[branch] for branch in batches] if separate else [list(batches)]
        live = [self.live.of(state, group) for group in groups]
        ways, means = self.guide(state, batches, weights, groups, live)
        parameters = [p for _, p in state.generator.named_parameters()]
        gradients: dict[str, Gradients] = {}
        for group, sparse, (x, dx) in zip(groups, live, ways):
            with (
                part("generator_backward_" + "_".join(group)),
                sparse or nullcontext(),
            ):  # checkpointing passes forward again
                grads = gradients_of(x, parameters, dx, sparse)
            gradients[group[0] if separate else "sum"] = grads
        return gradients, means

    def guide(
        self,
        state: TrainState,
        batches: dict[str, Batch],
        weights: dict[str, float],
        groups: list[list[str]],
        live: list[SparseBackward | None],
    ) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
        """((x_g, dL/dx_g) of each group of branches, ready to go back through θ; mean losses by branch). x_g: what θ is
        differentiated through, samples of a one-step generator or predictions of a denoiser.

        live: for each group what θ's forward pass runs in.
        """
        recipe, drawing = self.recipe, self.attacks.drawing(state)
        with self.autocast():
            x_groups = []
            for group, sparse in zip(groups, live):
                joined = concatenate([batches[branch] for branch in group])
                with part("generator_forward"), sparse or nullcontext():
                    x_groups.append(self.objective.forward(recipe, drawing, joined))
            x_g = torch.cat([x.detach() for x in x_groups]).requires_grad_(True)
            batch = concatenate([batches[branch] for group in groups for branch in group])
            with part("guide_forward"):
                branches = [branch for group in groups for branch in group]
                networks = Networks(state.teacher, state.score, state.generator)
                per_sample = self.objective.loss(recipe, networks, x_g, batch, branches)
        loss = weighted_mean(per_sample, weights)
        with part("guide_backward"):
            (dx_g,) = torch.autograd.grad(loss, x_g)
        state.images += x_g.shape[0] * self.ranks.world
        means = per_sample.detach().view(len(weights), -1).mean(1)
        ways = [(x, dx.to(x.dtype)) for x, dx in zip(x_groups, dx_g.split([x.shape[0] for x in x_groups]))]
        return ways, dict(zip(weights, means.unbind()))
