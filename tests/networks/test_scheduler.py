"""Which schedulers are followed, and that each is followed exactly: class defaults, betas, clipping. The rest is one line."""

import json

import diffusers
import pytest
import torch
from tiny_models import write_tiny_model

from pecker_fast.errors import ModelError
from pecker_fast.forgetting.samplers import ddim_sample, sample_noise
from pecker_fast.networks.denoiser import load_denoiser
from pecker_fast.networks.schedule import load_schedule
from pecker_fast.networks.scheduler import CONFIG, FOLLOWED

BUILDABLE = sorted(FOLLOWED - {"DPMSolverSDEScheduler"})  # that one needs another package to be built
OTHERS = (
    *("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "EDMEulerScheduler", "ScoreSdeVeScheduler"),
    *("EDMDPMSolverMultistepScheduler", "CMStochasticIterativeScheduler", "KarrasVeScheduler", "ScoreSdeVpScheduler"),
    *("VQDiffusionScheduler", "RePaintScheduler", "UnCLIPScheduler", "IPNDMScheduler", "CogVideoXDDIMScheduler"),
    *("LCMScheduler", "TCDScheduler", "CosineDPMSolverMultistepScheduler", "MyOwnScheduler"),
)


def write(folder, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", OTHERS)
def test_other_processes_are_refused_by_their_class(tmp_path, name):
    with pytest.raises(ModelError, match=rf"{CONFIG}: {name} .* is not supported"):
        load_schedule(write(tmp_path / "scheduler", _class_name=name))


@pytest.mark.some(6)
@pytest.mark.parametrize("name", BUILDABLE)
def test_every_scheduler_that_is_followed_has_its_own_betas(tmp_path, name):
    """Of a config without betas too: the defaults of the classes differ."""
    kind = getattr(diffusers, name)
    for config in ({}, {"beta_schedule": "squaredcos_cap_v2"}, {"beta_start": 0.001, "beta_end": 0.01}):
        schedule = load_schedule(write(tmp_path / "scheduler", _class_name=name, **config))
        want = kind(**config)
        assert torch.allclose(schedule.a.square(), (1 - want.betas).cumprod(0), atol=1e-6)
        euler = diffusers.EulerDiscreteScheduler(**schedule.config)  # what the export is drawn with
        assert torch.equal(euler.betas, want.betas)


def test_defaults_of_the_classes_do_differ():
    assert not torch.equal(diffusers.HeunDiscreteScheduler().betas, diffusers.DDPMScheduler().betas)


@pytest.mark.parametrize(
    ("name", "betas"), [("DDPMScheduler", "sigmoid"), ("DDPMScheduler", "laplace"), ("HeunDiscreteScheduler", "exp")]
)
def test_betas_that_not_every_scheduler_knows_are_carried_as_numbers(tmp_path, name, betas):
    want = getattr(diffusers, name)(beta_schedule=betas).betas
    if not bool(((want > 0) & (want <= 1)).all()):  # laplace has negative ones: no diffusion, whatever draws with it
        with pytest.raises(ModelError, match="every beta must lie above 0"):
            load_schedule(write(tmp_path / "scheduler", _class_name=name, beta_schedule=betas))
        return
    schedule = load_schedule(write(tmp_path / "scheduler", _class_name=name, beta_schedule=betas))
    config = json.loads(json.dumps(schedule.config))
    assert torch.equal(diffusers.EulerDiscreteScheduler(**config).betas, want)
    assert torch.equal(diffusers.DDIMScheduler(**config).betas, want)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_flow_sigmas", True), ("use_dynamic_shifting", True), ("timestep_type", "continuous"), ("shift", 3.0),
        ("shift_terminal", 0.1), ("snr_shift_scale", 3.0), ("sigma_min", 0.002), ("sigma_max", 80.0), ("sigma_data", 0.5),
        ("predict_epsilon", False), ("prediction_type", "flow_prediction"), ("prediction_type", "trigflow"),
        ("beta_schedule", "bent"), ("num_train_timesteps", "many"), ("trained_betas", [0.1, 0.2]),
    ],
)  # fmt: skip
def test_keys_that_change_the_meaning_are_refused_by_name(tmp_path, key, value):
    with pytest.raises(ModelError, match=key if key != "beta_schedule" else "not a schedule"):
        load_schedule(write(tmp_path / "scheduler", _class_name="EulerDiscreteScheduler", **{key: value}))


def test_keys_of_sampling_alone_change_nothing(tmp_path):
    plain = load_schedule(write(tmp_path / "a" / "scheduler", _class_name="EulerDiscreteScheduler"))
    sampling = {
        "use_karras_sigmas": True, "timestep_spacing": "trailing", "interpolation_type": "log_linear", "flow_shift": 3.0,
        "final_sigmas_type": "sigma_min", "use_flow_sigmas": False, "sigma_max": None, "shift": 1.0,
    }  # fmt: skip
    other = load_schedule(write(tmp_path / "b" / "scheduler", _class_name="EulerDiscreteScheduler", **sampling))
    assert torch.equal(plain.a, other.a)
    assert plain.config == other.config


def test_the_class_is_the_one_of_the_index(tmp_path):
    """As `from_pretrained` has it; both must be followed."""
    folder = write(tmp_path / "scheduler", _class_name="DDPMScheduler")
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"scheduler": ["diffusers", "HeunDiscreteScheduler"]}))
    want = diffusers.HeunDiscreteScheduler().betas
    assert torch.allclose(load_schedule(folder).a.square(), (1 - want).cumprod(0), atol=1e-6)
    index.write_text(json.dumps({"scheduler": ["diffusers", "EDMEulerScheduler"]}))
    with pytest.raises(ModelError, match=r"model_index.json: EDMEulerScheduler \(the noise levels of EDM\)"):
        load_schedule(folder)


def test_zero_terminal_snr_tells_noise_nothing(tmp_path):
    keys = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}
    with pytest.raises(ModelError, match=r"rescale_betas_zero_snr .* timestep 999"):
        load_schedule(write(tmp_path / "scheduler", **keys))
    schedule = load_schedule(write(tmp_path / "scheduler", **keys, prediction_type="v_prediction"))
    assert float(schedule.a[-1]) == 0
    with pytest.raises(ModelError, match="PNDMScheduler ignores"):
        load_schedule(write(tmp_path / "scheduler", _class_name="PNDMScheduler", rescale_betas_zero_snr=True))
    ends = {"num_train_timesteps": 3, "trained_betas": [0.1, 0.5, 1.0]}
    with pytest.raises(ModelError, match=r"zero terminal SNR.* timestep 2"):
        load_schedule(write(tmp_path / "scheduler", _class_name="DDIMScheduler", **ends))


def test_the_teacher_draws_finite_images_from_zero_snr(tmp_path):
    model = write_tiny_model(tmp_path / "model", "v_prediction", judge=False)
    write(model / "scheduler", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert bool(ddim_sample(load_denoiser(model), torch.tensor([0, 1]), 2, 0).isfinite().all())


@pytest.mark.parametrize(
    "clipping", [{"clip_sample": True, "clip_sample_range": 0.5}, {"clip_sample": False}, {"thresholding": True}]
)
def test_the_teachers_row_is_bounded_as_its_own_sampler_bounds_it(tmp_path, clipping):
    model = write_tiny_model(tmp_path / "model", judge=False)
    betas = {"beta_start": 1e-4, "beta_end": 0.02}
    write(model / "scheduler", _class_name="DDIMScheduler", **betas, **clipping)
    teacher = load_denoiser(model)
    scheduler = diffusers.DDIMScheduler(**betas, **clipping, timestep_spacing="trailing")
    scheduler.set_timesteps(3)
    x, labels = sample_noise(teacher, 2, 0), torch.tensor([0, 1])
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(teacher.unet(x, t, class_labels=labels).sample, t, x).prev_sample
    assert torch.allclose(ddim_sample(teacher, labels, 3, 0), x.clamp(-1, 1), atol=1e-5)


def test_a_scheduler_that_bounds_nothing_leaves_the_teacher_alone(tmp_path):
    assert load_schedule(write(tmp_path / "scheduler", _class_name="PNDMScheduler")).clipping == {"clip_sample": False}
    assert load_schedule(write(tmp_path / "scheduler", _class_name="DDPMScheduler")).clipping["clip_sample"] is True
