"""Hub models: configs are looked at first, and of the weights only those that are read are fetched."""

import fnmatch
import shutil
from pathlib import Path

import pytest

from pecker_fast import files
from pecker_fast.errors import ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
STEM = "diffusion_pytorch_model"
INDEX = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
INDEX |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}


class Hub:
    """A repository in a folder, and what was fetched of it so far."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache = root / "repository", root / "hub" / "models--me--model" / "snapshots" / COMMIT
        self.asked: list[str] = []
        self.listing = True
        for name in ("unet", "vae", "text_encoder", "tokenizer"):
            self.put(f"{name}/config.json", {"_class_name": "UNet2DConditionModel"} if name == "unet" else {})
        for name in ("model_index.json", "tokenizer/vocab.json", "tokenizer/tokenizer.json"):
            self.put(name, INDEX if name == "model_index.json" else {})
        for name in (
            "tokenizer/merges.txt",
            "safety_checker/model.safetensors",
            "safety_checker/config.json",
            "evil.py",
            "vae/notes.json",
            "tokenizer/notes.txt",
        ):
            self.put(name, {})
        for name in ("v1-5-pruned.safetensors", "image_encoder/model.safetensors", f"unet/{STEM}.non_ema.safetensors"):
            self.put(name, {})
        for part in ("unet", "vae", "text_encoder"):
            stem = "model" if part == "text_encoder" else STEM
            for end in ("safetensors", "bin", "fp16.safetensors", "fp16.bin"):
                self.put(f"{part}/{stem}.{end}", {})

    def put(self, name: str, content) -> None:
        files.write_json(self.root / name, content)

    def names(self) -> list[str]:
        return sorted(str(file.relative_to(self.root)) for file in self.root.rglob("*") if file.is_file())

    def download(self, name, revision=None, allow_patterns=None, ignore_patterns=()):
        self.asked.append(revision)
        self.cache.mkdir(parents=True, exist_ok=True)
        for file in self.names():
            allowed = any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)
            if allowed and not any(fnmatch.fnmatch(file, pattern) for pattern in ignore_patterns):
                (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.root / file, self.cache / file)
        return str(self.cache)

    def listed(self, name, revision=None):
        if not self.listing:
            raise OSError("no route to host")
        return self.names()

    def fetched(self, suffix: str = ".safetensors") -> list[str]:
        return sorted(str(file.relative_to(self.cache)) for file in self.cache.rglob(f"*{suffix}"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub

    hub = Hub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda self, *given, **keys: hub.listed(*given, **keys)
    )
    return hub


PLAIN = ["text_encoder/model.safetensors", f"unet/{STEM}.safetensors", f"vae/{STEM}.safetensors"]


@pytest.mark.parametrize("listing", [True, False])
def test_the_plain_weights_of_the_parts_that_are_read_are_fetched(hub, listing):
    hub.listing = listing
    assert files.resolve_model("me/model") == hub.cache
    assert hub.fetched() == PLAIN
    assert hub.fetched("merges.txt") == ["tokenizer/merges.txt"]
    assert hub.fetched(".bin") == hub.fetched(".py") == hub.fetched("notes.json") == hub.fetched("notes.txt") == []
    assert hub.asked == [None, COMMIT]  # the same commit, should the hub move on in between


def test_where_the_plain_file_is_missing_the_variant_is_fetched(hub):
    for name in (f"unet/{STEM}.safetensors", f"vae/{STEM}.safetensors"):
        (hub.root / name).unlink()
    (hub.root / f"vae/{STEM}.fp16.safetensors").unlink()
    for number in (1, 2):
        hub.put(f"vae/{STEM}.fp16-0000{number}-of-00002.safetensors", {})
    hub.put(f"vae/{STEM}.safetensors.index.fp16.json", {})
    folder = files.resolve_model("me/model")
    assert hub.fetched() == [
        "text_encoder/model.safetensors",
        f"unet/{STEM}.fp16.safetensors",
        f"vae/{STEM}.fp16-00001-of-00002.safetensors",
        f"vae/{STEM}.fp16-00002-of-00002.safetensors",
    ]
    assert any("fp16 variant is taken for unet, vae" in note for note in files.model_notes(folder))


def test_a_variant_left_in_the_cache_serves_where_the_hub_is_silent(hub, monkeypatch):
    hub.download("me/model", allow_patterns=["*.json", "*.fp16.safetensors"])

    def silent(name, revision=None, allow_patterns=(), ignore_patterns=()):
        if "unet/*.safetensors" in allow_patterns:
            raise OSError("the cached snapshot is incomplete")
        return str(hub.cache)

    hub.listing = False
    monkeypatch.setattr("huggingface_hub.snapshot_download", silent)
    assert files.resolve_model("me/model") == hub.cache
    (hub.cache / "unet" / f"{STEM}.fp16.safetensors").unlink()
    with pytest.raises(ModelError, match="the cached snapshot is incomplete"):
        files.resolve_model("me/model")


REFUSED = {
    "custom code in the index": (
        lambda hub: hub.put("model_index.json", INDEX | {"unet": ["my_unet", "UNet"]}),
        "unet names custom code",
    ),
    "custom code in a config": (
        lambda hub: hub.put("text_encoder/config.json", {"auto_map": {"AutoModel": "x.Evil"}}),
        "auto_map names custom code",
    ),
    "no UNet at all": (lambda hub: shutil.rmtree(hub.root / "unet"), "a StableDiffusionPipeline is not supported yet"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_before_weights_are_fetched(hub, name):
    hurt, match = REFUSED[name]
    hurt(hub)
    for ask in (lambda: files.resolve_model("me/model"), lambda: files.look_at_hub("me/model", None)):
        with pytest.raises(ModelError, match=match):
            ask()
    assert hub.fetched() == []


def test_pickles_alone_are_told_before_the_rest_is_fetched(hub):
    for file in (hub.root / "vae").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ModelError, match=r"me/model: vae: holds only pickle weights"):
        files.resolve_model("me/model")
    assert hub.fetched() == []


def test_a_look_fetches_no_weights(hub):
    assert files.look_at_hub("me/model", "v2") == hub.cache
    assert hub.fetched() == []
    assert hub.asked == ["v2"]


def test_a_hub_that_is_silent_is_no_verdict_and_a_missing_model_is(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RevisionNotFoundError

    def silent(name, **keys):
        raise OSError("no route to host\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", silent)
    assert files.look_at_hub("nobody-owner/name", None) is None
    with pytest.raises(ModelError) as caught:
        files.resolve_model("nobody-owner/name")
    assert "nobody-owner/name: no such local folder, and the Hugging Face hub did not give it" in str(caught.value)
    assert "second line" not in str(caught.value)

    def gone(name, **keys):
        raise RevisionNotFoundError.__new__(RevisionNotFoundError)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gone)
    with pytest.raises(ModelError, match="RevisionNotFoundError"):
        files.look_at_hub("nobody-owner/name", "v9")


def test_doctor_tells_a_bad_model_of_the_hub_from_one_it_could_not_ask_for(hub):
    from pecker_fast.machine import doctor
    from pecker_fast.recipe import recipe_from

    recipe = recipe_from({"model": "me/model", "forget": "a circle", "cover": "a square", "retain": ["a star"]})

    def of_the_model() -> list[tuple[str, str]]:
        return [(check.state, f"{check.found} {check.remedy}") for check in doctor(recipe) if check.name == "model"]

    fetching, beside = of_the_model()
    assert fetching[0] == "note"
    assert "`train` fetches it" in fetching[1]
    assert "left out, never loaded: safety_checker" in beside[1]
    hub.put("model_index.json", INDEX | {"unet": ["my_unet", "UNet"]})
    ((state, text),) = of_the_model()
    assert state == "missing"
    assert "unet names custom code" in text
    assert hub.fetched() == []
