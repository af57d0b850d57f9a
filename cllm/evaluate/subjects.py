"""Models to evaluate: a run, one of its checkpoints, or a Hugging Face checkpoint folder."""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cllm.data.manifest import Manifest
from cllm.data.vocabulary import backend_of, backend_sha256
from cllm.errors import UserError
from cllm.evaluate.result_folders import results_of_checkpoint
from cllm.files import inside
from cllm.hub.kind import identify_model, is_export
from cllm.runs import RunFolder, load_run
from cllm.trust import load_tokenizer, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cllm.posthoc.method import Engine

log = logging.getLogger(__name__)

_DEFAULT_WINDOW = 2048


class Subject(ABC):
    """A model, and what is needed to evaluate it."""

    kind: str
    """`run` or `huggingface`."""
    name: str
    path: Path
    """As the user gave it."""
    folder: Path
    """The run's or checkpoint's folder."""
    default_results: Path
    """The folder of results, if no other is given."""
    checkpoint: str
    """Name of the weights' file or folder."""
    step: int | None
    """Optimizer step of the weights; None: unknown."""
    trained_tokens: int | None = None
    """Tokens that the weights were trained on; None: unknown, as for a model that starts from others' weights."""
    latest: bool
    """False for a checkpoint that is not its run's newest."""
    design: str
    """A label for people."""
    context: int | None
    """Longest window in tokens; None: unknown."""
    window: int
    """Default window: the length that the model was trained at, if known."""
    document_mask: bool = False
    """Whether documents are hidden from each other."""
    precision: str
    """`bf16` (autocast) or `fp32`."""
    tensorboard: Path | None = None
    """Folder for TensorBoard events of results; None: write none."""
    default_sets: dict[str, Path]
    """Sets to evaluate by default: name, prepared folder."""
    digests: dict[Path, str]
    """Digests of these data folders as recorded in training; None if not recorded."""
    vocab_size: int
    """Number of token ids in the model's embedding."""
    results_moved_to: Path | None = None
    """A folder that gets the results in place of the default one, see `cllm/evaluate/parallel/`."""
    _model: Any

    @property
    def model(self) -> nn.Module:
        """The model itself, on its device: a `Decoder`, or a transformers model."""
        return self._model

    def results(self, out: Path | None = None) -> Path:
        """The folder of results: `out`; by default evaluation/ in a run's folder, or runs/evaluation/NAME for others.

        Raises:
            UserError: if a run's evaluation/ is a link that leaves the run.
        """
        return out or self.results_moved_to or self.default_results

    @property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises `UserError` if it cannot be loaded."""

    @property
    @abstractmethod
    def tokenizer_sha256(self) -> str | None:
        """The hash that identifies the tokenizer in records; None if it has no tokenizer.json form."""

    @abstractmethod
    def tokenizes(self, data: Manifest) -> bool:
        """Whether the tokens of a prepared folder are those of the model's tokenizer. Raises `UserError`."""

    @property
    @abstractmethod
    def start_id(self) -> int | None:
        """The token fed before a text's first one; None: the first token of a document is never predicted."""

    @abstractmethod
    def logits(self, input_ids: Tensor, positions: Tensor | None, document_ids: Tensor | None, last: int) -> Tensor:
        """Logits (B, last, vocabulary) at the last `last` positions of `input_ids` (B, T), int64, on the device."""

    def engine(self) -> Engine:
        """The model with a cache, for post-hoc compression."""
        from cllm.posthoc.engine import engine_of

        return engine_of(self.model)

    def sample_engine(self) -> Engine:
        """The engine for suites of samples: the same, or a faster one with equal logits."""
        return self.engine()


class RunSubject(Subject):
    """A run's newest checkpoint, or the checkpoint file given. Raises `UserError` as `load_run` does."""

    kind = "run"

    def __init__(self, path: Path, device: torch.device):
        self._model, config, step = load_run(path, device=device)
        run = RunFolder.of(path)
        self._data = Path(config.data.main_folder)
        self.name, self.path, self.folder = run.name, path, run.path
        self.step = step if step >= 0 else None
        if self.step is not None and config.init.path is None:
            self.trained_tokens = self.step * config.train.global_batch * config.data.seq_len
        self.checkpoint = path.name if path.suffix == ".ckpt" else run.checkpoint_path(step).name
        newest = [checkpoint.name for _, checkpoint in run.checkpoints()[-1:]]
        self.latest = path.suffix != ".ckpt" or newest == [self.checkpoint]
        self.design = run.summary().get("design", "") if run.summary_file.exists() else ""
        self.design = self.design or config.model.design
        self.context, self.window = config.model.max_seq_len, config.data.seq_len
        self.document_mask = config.data.document_mask
        self.precision = "bf16" if device.type == "cuda" and config.train.precision != "fp32" else "fp32"
        self.tensorboard = run.tensorboard_folder
        self.default_sets = {name: Path(folder) for name, folder in config.data.validation_sets.items()}
        recorded = run.data_digests()
        self._digest = None if recorded is None else recorded.train
        validation = {} if recorded is None else recorded.validation
        self.digests = {path: validation[name] for name, path in self.default_sets.items() if name in validation}
        self.vocab_size = self._model.embed.num_embeddings

    def results(self, out: Path | None = None) -> Path:
        return out or self.results_moved_to or inside(self.folder, "evaluation", written_in=self.folder, to_write=True)

    @cached_property
    def _manifest(self) -> Manifest:
        """The manifest of the folder that the run was trained on; its tokenizer is the run's."""
        manifest = Manifest.read(self._data)
        manifest.check_unchanged(self._digest, self.folder)
        return manifest

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._manifest.tokenizer()

    @property
    def tokenizer_sha256(self) -> str:
        return self._manifest.tokenizer_sha256

    def tokenizes(self, data: Manifest) -> bool:
        return self._manifest.same_tokenizer(data)

    @property
    def start_id(self) -> int | None:
        return None if self.document_mask else self._manifest.eos_id

    def logits(self, input_ids: Tensor, positions: Tensor | None, document_ids: Tensor | None, last: int) -> Tensor:
        return self._model.head(self._model.hidden(input_ids, positions, document_ids)[:, -last:])


class HuggingFaceSubject(Subject):
    """A folder with config.json, safetensors weights and a tokenizer. No code from the folder is run."""

    kind = "huggingface"
    latest = True

    def __init__(self, path: Path, device: torch.device):
        from cllm.hub.loading import load_model

        model = load_model(path, dtype="auto" if device.type == "cuda" else torch.float32).to(device)
        self._describe(model, path.resolve().name, path, device)
        self.default_results = results_of_checkpoint(path)

    def _describe(self, model: Any, name: str, path: Path, device: torch.device) -> None:
        self._model = model
        self._keeps_last = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        config = self._model.config.get_text_config()
        self.name, self.path, self.folder, self.checkpoint = name, path, path, path.name
        self.step, self.default_sets, self.digests = None, {}, {}
        self.vocab_size = self._model.get_input_embeddings().weight.shape[0]
        self.design = str(getattr(config, "design", config.model_type))
        self.context = getattr(config, "max_position_embeddings", None)
        self.window = min(self.context or _DEFAULT_WINDOW, _DEFAULT_WINDOW)
        self.precision = "bf16" if device.type == "cuda" else "fp32"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.path)

    def sample_engine(self) -> Engine:
        """cllm's decoder on a GPU, where static caches and CUDA graphs pay; on a CPU it is slower by a fifth."""
        on_gpu = next(self.model.parameters()).is_cuda
        return (self._decoder_engine if on_gpu else None) or self.engine()

    @cached_property
    def _decoder_engine(self) -> Engine | None:
        """cllm's decoder with the same tensors, for static caches and graphs; None: it cannot compute the model."""
        from cllm.hub.families import decoder_of
        from cllm.posthoc.engine import DecoderEngine

        if not self.path.is_dir() or is_export(read_object(self.path / "config.json")):
            return None
        try:
            return DecoderEngine(decoder_of(self._model, self.path))
        except UserError as error:
            log.info("%s: samples are read by transformers: %s", self.path, error)
            return None

    @property
    def tokenizer_sha256(self) -> str | None:
        try:
            return backend_sha256(backend_of(self.tokenizer, self.path))
        except UserError:
            return None  # a tokenizer written in Python can score text too

    def tokenizes(self, data: Manifest) -> bool:
        return data.is_tokenized_by(backend_of(self.tokenizer, self.path))

    @property
    def start_id(self) -> int | None:
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def logits(self, input_ids: Tensor, positions: Tensor | None, document_ids: Tensor | None, last: int) -> Tensor:
        assert (positions, document_ids) == (None, None), "Hugging Face models are fed a plain stream"
        options = {"logits_to_keep": last} if self._keeps_last else {}
        return self._model(input_ids=input_ids, use_cache=False, **options).logits[:, -last:]


class MemorySubject(HuggingFaceSubject):
    """A transformers model in memory, on its device, and its tokenizer. Its results have no folder."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase):
        name = type(model).__name__
        self._describe(model, name, Path(f"<{name}>"), next(model.parameters()).device)
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._tokenizer


def load_subject(path: str | Path, device: torch.device) -> Subject:
    """Load the model that `--run` names, with its weights on `device`.

    Raises:
        UserError: if the path does not exist, is no model, or cannot be loaded.
    """
    path = Path(path)
    return RunSubject(path, device) if identify_model(path).is_run else HuggingFaceSubject(path, device)
