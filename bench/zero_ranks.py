"""The update of one network over two ranks, processes of their own: DeepSpeed can be set up once in a process."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from traffic import Traffic

CHANNELS = {"tiny": (32, 32), "full": (128, 192)}
WORLD = 2


@dataclass(frozen=True)
class Plan:
    """stage: of ZeRO. density: of the mask, None = none. scale: of the network. rule: of a whole iteration of the digits
    recipe ("dense" without a mask); None = one update of a larger network alone."""

    stage: int
    density: float | None
    scale: str
    rule: str | None = None


class Given(torch.autograd.Function):
    """A loss whose gradients are given: nothing is computed on the way back."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        return None, *(g.clone() for g in ctx.gradients)


class Update:
    """Reduction of θ's gradient, step, new weights to all ranks: an iteration without its networks' passes."""

    def __init__(self, plan: Plan) -> None:
        from diffusers import UNet2DModel
        from pecker_kernels import SaliencyMask

        from pecker_fast.engine.zero import Sharded
        from pecker_fast.engine.zero.compact import CompactExchange
        from pecker_fast.engine.zero.settings import deepspeed_settings
        from pecker_fast.forgetting.methods import get_method
        from pecker_fast.machine.ranks import Group
        from pecker_fast.networks.denoiser import Denoiser
        from pecker_fast.recipe import recipe_from

        torch.manual_seed(0)
        network: Any = UNet2DModel(
            sample_size=32, block_out_channels=CHANNELS[plan.scale], down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2, num_class_embeds=10, norm_num_groups=8,
        )  # fmt: skip
        keys: dict[str, Any] = {
            "batch_size": 2,
            "engine": {"zero": plan.stage},
            "update_rule": "salient_only",
            "lr": 1e-6,
        }
        recipe = recipe_from({**keys, **({} if plan.density else {"mask": {"source": "none"}})})
        named = [(name, torch.empty(1).expand(p.shape)) for name, p in network.named_parameters()]
        mask = SaliencyMask.random(named, density=plan.density, seed=0) if plan.density else None
        self.network = Sharded(Denoiser(network, None), deepspeed_settings(recipe, dist.get_world_size()))  # type: ignore[arg-type]
        local = None if mask is None else self.network.shards.cut(mask)
        self.rule = get_method("pecker").updates_of_sums(recipe, self.network.named_partition, local)
        self.exchange = (
            CompactExchange(self.network, mask, Group(600.0)) if mask is not None and plan.stage < 3 else None
        )
        self.optimizer = self.rule.optimizer_of(("retain", "forget"))
        self.weights = self.network.shards.total
        gradients = torch.Generator().manual_seed(dist.get_rank())
        self.gradients = [torch.randn(shape, generator=gradients) for shape in self.network.shards.shapes.values()]
        self.compact = self.exchange.flat(self.gradients) if self.exchange is not None else None

    def __call__(self) -> None:
        if self.exchange is not None:
            self.exchange.step(self.optimizer, self.exchange.mean(self.compact))  # type: ignore[arg-type]
            return
        parameters = list(self.network.parameters.values())
        if self.network.stage == 3:  # whole only while a module runs; gathered for their gradients, as in training
            import deepspeed

            with deepspeed.zero.GatheredParameters(parameters):
                self.network.backward(Given.apply(self.gradients, *parameters))
        else:
            self.network.backward(Given.apply(self.gradients, *parameters))
        self.network.step(self.optimizer)


class Iteration:
    """A whole iteration of the digits recipe; in stage 3 nothing stays gathered longer than it is used."""

    def __init__(self, plan: Plan) -> None:
        from pecker_fast.loading.parts import load_parts
        from pecker_fast.machine.ranks import Group
        from pecker_fast.recipe import load_recipe
        from pecker_fast.runs.training import engine_of

        settings = Path(tempfile.mkdtemp()) / "deepspeed.json"
        nothing = dict.fromkeys(
            ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"), 0
        )
        settings.write_text(json.dumps({"zero_optimization": nothing}))
        keys = [f"engine.zero={plan.stage}", f"engine.deepspeed={settings}", "mask.samples=48", "batch_size=8"]
        keys += (
            [f"update_rule={plan.rule}", f"mask.density={plan.density}"]
            if plan.rule != "dense"
            else ["mask.source=none"]
        )
        recipe = load_recipe("digits_plain", keys)
        parts = load_parts(recipe)
        self.engine = engine_of(recipe, parts, torch.device("cpu"), Group(600.0))
        self.state = self.engine.start(parts.teacher, parts.score, parts.generator)
        mask = self.engine.make_mask(self.state) if recipe.uses_mask else None
        self.engine.follow(self.state, mask)
        self.weights = self.state.networks["generator"].shards.total  # type: ignore[attr-defined]

    def __call__(self) -> None:
        from pecker_fast.runs.loop import iteration

        iteration(self.engine, self.state)


class Ranks:
    """Two processes with one update each, which they do when they are told."""

    def __init__(self, plan: Plan) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        context = mp.get_context("spawn")
        self.ends: list[Any] = []
        self.processes = []
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, plan, there), daemon=True)
            process.start()
            self.ends.append(here)
            self.processes.append(process)
        self.weights = self.do("weights")

    def do(self, what: str) -> Any:
        """Tell both, wait for both; what rank 0 answers."""
        for end in self.ends:
            end.send(what)
        answers = []
        for end in self.ends:
            if not end.poll(120):
                raise RuntimeError(f"no answer to {what}")
            answers.append(end.recv())
        return answers[0]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, port: int, plan: Plan, pipe: Any) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    update = Update(plan) if plan.rule is None else Iteration(plan)
    while True:
        what = pipe.recv()
        answer: Any = None
        if what == "weights":
            answer = update.weights
        elif what == "update":
            update()
        else:
            with Traffic() as traffic:
                update()
            answer = dict(traffic.sent)
        pipe.send(answer)
