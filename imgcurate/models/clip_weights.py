"""open_clip weights: where they are, how they get there, what they are, and how to load them safely."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from imgcurate.errors import ConfigError, WeightsError
from imgcurate.lazy import torch
from imgcurate.models.weights import default_model_dir, file_sha256

__all__ = ["ClipWeights", "embed_dim", "find", "identity", "load", "present", "takes_transformers", "tokenizer"]

RANDOM: Final = "random"
_MOST_SAID: Final = 300
_SUFFIXES: Final = (".safetensors", ".pt", ".pth", ".bin")
_PREPROCESS: Final = ("mean", "std", "interpolation", "resize_mode", "fill_color")
_AGREED: Final = 0.75
_NO_TEXTS: Final = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipWeights:
    """The weights of an open_clip model, found on disk.

    Attributes
    ----------
    model : str
        Architecture.
    path : Path or None
        The file; None for random weights.
    identity : str
        ``ViT-L-14/openai``; of a file that is not known, ``ViT-L-14/sha256:`` and 16 digits.
    quick_gelu : bool
        Whether the weights were trained with QuickGELU, as OpenAI's were.
    openai_archive : bool
        Whether the file is one of OpenAI's TorchScript archives, by its checksum.
    preprocess : dict
        ``size`` (height, width), ``mean``, ``std``, ``interpolation``, ``resize_mode``, ``fill_color``.
    """

    model: str
    path: Path | None
    identity: str
    quick_gelu: bool
    openai_archive: bool
    preprocess: dict[str, Any]

    def preprocess_if_unusual(self) -> str | None:
        """Return how images are prepared for a file of weights, as JSON, where that is not as for OpenAI's."""
        usual = _preprocess(self.model, None)
        is_file = self.identity.startswith(f"{self.model}/sha256:")
        return json.dumps(self.preprocess, sort_keys=True) if is_file and self.preprocess != usual else None

    def sha256(self) -> str:
        """Return the checksum of the file; of random weights the words ``random, seed 0``."""
        return file_sha256(self.path) if self.path else "random, seed 0"


def find(model: str, pretrained: str, model_dir: str | None = None) -> ClipWeights:
    """Find the weights of a model, downloading them into `model_dir` if they are not there.

    Parameters
    ----------
    model : str
        An open_clip architecture.
    pretrained : str
        An open_clip tag, the path of a file, or ``random``.
    model_dir : str, optional
        Looked through first for ``<model>-<tag>.safetensors`` (or .pt, .pth, .bin) and OpenAI's own
        file name; downloads of open_clip are kept there. Default: :func:`default_model_dir`.

    Raises
    ------
    ConfigError
        If `pretrained` is neither a tag of the model nor a file.
    WeightsError
        If the weights cannot be downloaded.
    """
    import open_clip.pretrained as registry

    if pretrained == RANDOM:
        quick = bool(_model_config(model).get("quick_gelu", False))
        return ClipWeights(model, None, f"{model}/{RANDOM}", quick, False, _preprocess(model, None))
    cfg = registry.get_pretrained_cfg(model, pretrained)
    if cfg:
        path = _find_file(model, pretrained, cfg, model_dir) or _download(model, pretrained, cfg, model_dir)
        archive = path.suffix == ".pt" and file_sha256(path) in _openai_checksums()
        quick = bool(cfg.get("quick_gelu", False) or _model_config(model).get("quick_gelu", False))
        return ClipWeights(model, path, identity(model, pretrained), quick, archive, _preprocess(model, cfg))
    path = Path(pretrained).expanduser()
    if not path.is_file():
        tags = registry.list_pretrained_tags_by_model(model)
        raise ConfigError(
            f"pretrained={pretrained!r} is neither a file nor a tag of {model}: "
            f"its tags are {', '.join(tags) or 'none'}; 'random' gives random weights"
        )
    checksum = file_sha256(path)
    openai = checksum in _openai_checksums()
    quick = openai or bool(_model_config(model).get("quick_gelu", False))
    name = _base_name(model) + "/openai" if openai else f"{model}/sha256:{checksum[:16]}"
    tag_cfg = registry.get_pretrained_cfg(model, "openai") if openai else None
    preprocess = _preprocess(model, tag_cfg) if openai else _preprocess_of_file(model, path)
    return ClipWeights(model, path, name, quick, openai, preprocess)


def present(model: str, pretrained: str, model_dir: str | None = None) -> Path | None:
    """Return the file that :func:`find` would take, without downloading anything; None if it would have to."""
    import open_clip.pretrained as registry

    cfg = registry.get_pretrained_cfg(model, pretrained)
    if not cfg:
        path = Path(pretrained).expanduser()
        return path if path.is_file() else None
    found = _find_file(model, pretrained, cfg, model_dir)
    return found or (_in_hub_cache(cfg["hf_hub"], _folder(model_dir)) if cfg.get("hf_hub") else None)


def identity(model: str, pretrained: str, model_dir: str | None = None) -> str:
    """Return the identity of a model's embeddings without downloading anything."""
    import open_clip.pretrained as registry

    if pretrained == RANDOM:
        return f"{model}/{RANDOM}"
    cfg = registry.get_pretrained_cfg(model, pretrained)
    if cfg:
        # "ViT-L-14-quickgelu" is the same network as "ViT-L-14" with weights that want QuickGELU.
        return f"{_base_name(model) if cfg.get('quick_gelu') else model}/{pretrained}"
    return find(model, pretrained, model_dir).identity


@contextlib.contextmanager
def _without_root_warnings() -> Iterator[None]:
    """Keep open_clip from warning that a model is random, which then gets its weights."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def load(weights: ClipWeights, *, texts: bool = True) -> Any:
    """Build the open_clip model and load its weights, without running any code from the file.

    Parameters
    ----------
    weights : ClipWeights
        What to load.
    texts : bool
        Whether the text tower is wanted. Without it one that is built by transformers is left out, which would take
        that package, and files of the hub.

    Raises
    ------
    WeightsError
        If the file is damaged or does not fit the architecture, or the text tower cannot be built.
    """
    from open_clip.factory import load_checkpoint

    with torch.random.fork_rng(devices=[]), _without_root_warnings():
        torch.manual_seed(0)
        model, sees_only = _built(weights, texts=texts)
    if weights.path is None:
        return model
    try:
        if sees_only:
            _load_visual(model, weights.path)
        elif weights.openai_archive:
            state = torch.jit.load(str(weights.path), map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
            for key in ("input_resolution", "context_length", "vocab_size"):
                state.pop(key, None)
            model.load_state_dict(state, strict=True)
        else:
            load_checkpoint(model, str(weights.path), strict=True, weights_only=True)
    except Exception as exc:
        # torch names what does not fit in the lines below its first.
        lines = [line.strip() for line in (str(exc) or type(exc).__name__).strip().splitlines()]
        said = f"{lines[0]} {lines[1][:_MOST_SAID]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
        raise WeightsError(f"{weights.path} does not hold weights of {weights.model}: {said}") from exc
    return model


def _built(weights: ClipWeights, *, texts: bool) -> tuple[Any, bool]:
    """Return the model with random weights, and whether its text tower is left out."""
    import open_clip

    config = _model_config(weights.model)
    if not texts and takes_transformers(weights.model) and "multimodal_cfg" not in config:
        quick = weights.quick_gelu or bool(config.get("quick_gelu", False))
        return open_clip.CustomTextCLIP(config["embed_dim"], config["vision_cfg"], _NO_TEXTS, quick_gelu=quick), True
    try:
        model = open_clip.create_model(
            weights.model, load_weights=False, pretrained_text=False, force_quick_gelu=weights.quick_gelu
        )
    except (ImportError, RuntimeError, OSError) as exc:
        if not takes_transformers(weights.model):
            raise
        first = (str(exc) or type(exc).__name__).strip().splitlines()[0]
        raise WeightsError(
            f"the text tower of {weights.model} is built by transformers, of files of the hub, and cannot be: {first}; "
            "pip install transformers; without a network these files have to be in its cache ($HF_HOME)"
        ) from exc
    return model, False


def takes_transformers(model: str) -> bool:
    """Return whether the text tower of a model is one that transformers builds."""
    return "hf_model_name" in _model_config(model).get("text_cfg", {})


def _load_visual(model: Any, path: Path) -> None:
    """Load the image tower alone."""
    from open_clip.factory import load_state_dict, resize_pos_embed

    state = {k: v for k, v in load_state_dict(str(path), weights_only=True).items() if k.startswith("visual.")}
    resize_pos_embed(state, model)
    missing, unexpected = model.load_state_dict(state, strict=False)
    wrong = [*(k for k in missing if k.startswith("visual.")), *unexpected]
    if wrong:
        raise WeightsError(f"{len(wrong)} tensors of the image tower are missing or not its own, first {wrong[0]}")


def tokenizer(model: str, model_dir: str | None = None) -> Any:
    """Return what turns texts into the tokens that a model takes: a list of n texts into integers of shape (n, length).

    Raises
    ------
    WeightsError
        If the model has a vocabulary of its own, which is missing and cannot be downloaded, or that wants a package.
    """
    from open_clip import get_tokenizer

    try:
        with _without_retry_lines():
            return get_tokenizer(model, cache_dir=str(_folder(model_dir)))
    except Exception as exc:
        first = (str(exc) or type(exc).__name__).strip().splitlines()[0]
        if isinstance(exc, ImportError):
            raise WeightsError(f"the tokenizer of {model} takes a package: pip install transformers ({first})") from exc
        raise WeightsError(
            f"the tokenizer of {model} could not be loaded: {first}. It is kept in the cache of {_folder(model_dir)}, "
            "which may be filled where there is a network"
        ) from exc


def embed_dim(model: str) -> int:
    """Return the length of a model's embeddings."""
    return int(_model_config(model)["embed_dim"])


def _folder(model_dir: str | None) -> Path:
    return Path(model_dir).expanduser() if model_dir else default_model_dir()


def _find_file(model: str, tag: str, cfg: dict[str, Any], model_dir: str | None) -> Path | None:
    folder = _folder(model_dir)
    names = [f"{name}-{tag}{suffix}" for name in dict.fromkeys((model, _base_name(model))) for suffix in _SUFFIXES]
    if tag == "openai" and cfg.get("url"):
        names.append(cfg["url"].rsplit("/", 1)[-1])
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _download(model: str, tag: str, cfg: dict[str, Any], model_dir: str | None) -> Path:
    folder = _folder(model_dir)
    logger.info("the weights of %s/%s are not in %s: downloading them", model, tag, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if cfg.get("hf_hub"):
            return _download_from_hub(cfg["hf_hub"], folder)
        from open_clip.pretrained import download_pretrained

        return Path(download_pretrained(cfg, cache_dir=str(folder)))
    except Exception as exc:
        source = f"the hub ({cfg['hf_hub'].rstrip('/')})" if cfg.get("hf_hub") else cfg.get("url", "its publisher")
        raise WeightsError(
            f"the weights of {model}/{tag} are not in {folder} and could not be downloaded from {source}. "
            f"Offline: put them there as {model}-{tag}.safetensors (or .pt), name the folder with model_dir / "
            "--model-dir, or use the encoder tiny-image, which needs none"
        ) from exc


def _download_from_hub(place: str, folder: Path) -> Path:
    """Download ``org/repository/[file]`` into the hub's cache in `folder`, safetensors if there are any.

    open_clip's own function takes a hub that is out of reach for a file that is not there, and
    tries every name, each with all retries.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, names = _hub_names(place)
    try:
        _look_up_hub()
    except OSError:
        if (there := _in_hub_cache(place, folder)) is not None:
            return there
        raise
    for name in names:
        try:
            with _without_retry_lines():
                return Path(hf_hub_download(repository, name, cache_dir=str(folder)))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            continue
    raise WeightsError(f"{repository} holds none of {', '.join(names)}")


def _look_up_hub() -> None:
    """Raise an OSError if the hub has no address here: its client would ask for half a minute."""
    from huggingface_hub import constants

    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    # A proxy looks names up by itself.
    if host and not urllib.request.getproxies():
        socket.getaddrinfo(host, None)


@contextlib.contextmanager
def _without_retry_lines() -> Iterator[None]:
    """Keep the hub's client from writing a line for each attempt, twice: what came of them is said at the end."""
    hub = logging.getLogger("huggingface_hub")
    before = hub.level
    hub.setLevel(max(hub.getEffectiveLevel(), logging.ERROR))
    try:
        yield
    finally:
        hub.setLevel(before)


def _hub_names(place: str) -> tuple[str, list[str]]:
    """Return the repository of ``org/repository/[file]``, and the files of it that would do."""
    repository, _, file = place.rpartition("/")
    if not file:
        return repository, ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    safe = [str(Path(file).with_suffix(".safetensors"))] if file.endswith((".bin", ".pth")) else []
    return repository, [*safe, file]


def _in_hub_cache(place: str, folder: Path) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    repository, names = _hub_names(place)
    found = (try_to_load_from_cache(repository, name, cache_dir=str(folder)) for name in names)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def _preprocess_of_file(model: str, path: Path) -> dict[str, Any]:
    """Return how images are prepared for weights of which nothing but the file is known.

    As ``open_clip_config.json`` beside it says, which open_clip's own exports have; else as for most of the
    published weights of the architecture.
    """
    import open_clip.pretrained as registry

    beside = path.with_name("open_clip_config.json")
    if beside.is_file():
        try:
            told = json.loads(beside.read_text(encoding="utf-8"))["preprocess_cfg"]
            return _preprocess(model, {k: told[k] for k in _PREPROCESS if k in told})
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise WeightsError(f"{beside} does not say how images are prepared, in preprocess_cfg: {exc!r}") from exc
    names = dict.fromkeys((model, _base_name(model), f"{_base_name(model)}-quickgelu"))
    tags = [(name, tag) for name in names for tag in registry.list_pretrained_tags_by_model(name)]
    known = [_preprocess(model, registry.get_pretrained_cfg(*tag)) for tag in tags] or [_preprocess(model, None)]
    chosen = max(known, key=known.count)
    if known.count(chosen) < _AGREED * len(known):
        logger.warning(
            "images are prepared for weights of %s in several ways: for %s it is done with mean %s, resize %s; an "
            "open_clip_config.json beside it would tell", model, path, chosen["mean"], chosen["resize_mode"],
        )  # fmt: skip
    return chosen


def _preprocess(model: str, cfg: dict[str, Any] | None) -> dict[str, Any]:
    from dataclasses import asdict

    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    merged: dict[str, Any] = merge_preprocess_dict(asdict(PreprocessCfg()), cfg or {})
    size = _model_config(model)["vision_cfg"].get("image_size", 224)
    merged["size"] = (size, size) if isinstance(size, int) else tuple(size)
    return merged


def _base_name(model: str) -> str:
    return model.removesuffix("-quickgelu")


@functools.cache
def _model_config(model: str) -> dict[str, Any]:
    import open_clip

    config: dict[str, Any] = open_clip.get_model_config(model)
    return config


@functools.cache
def _openai_checksums() -> frozenset[str]:
    """Return the SHA-256 of OpenAI's own files, which their URLs contain."""
    import open_clip.pretrained as registry

    models = registry.list_pretrained_models_by_tag("openai")
    urls = [registry.get_pretrained_cfg(m, "openai").get("url", "") for m in models]
    return frozenset(url.split("/")[-2] for url in urls if url.count("/") > 2)
