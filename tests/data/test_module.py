"""What Lightning is given: the same batches for any number of workers, and after any resumption."""

from __future__ import annotations

import json
import os
import signal
import time
from itertools import islice
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch

from cllm.config import Config
from cllm.data.module import DataModule, check_documents
from cllm.errors import DataError, UserError


def make(folder, validation=None, **changes) -> DataModule:
    settings = {"seq_len": 16, "micro_batch": 2, "global_batch": 4, "document_mask": True} | changes
    return DataModule(str(folder), validation, **settings)


def first_batches(module: DataModule, n: int, **trainer) -> list[dict[str, torch.Tensor]]:
    stand_in: Any = SimpleNamespace(**({"global_step": 0, "global_rank": 0, "world_size": 1} | trainer))
    module.trainer = stand_in
    return list(islice(module.train_dataloader(), n))


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


def test_of_a_config_it_is_the_same_as_built_by_hand(prepared):
    data = {"path": str(prepared), "seq_len": 16, "document_mask": True, "num_workers": 0}
    model = {"d_model": 16, "n_layers": 2, "n_heads": 2, "vocab_size": 2**16}
    train = {"micro_batch": 2, "global_batch": 4, "seed": 3}
    config = Config.model_validate({"name": "a", "model": model, "data": data, "train": train})
    by_hand = first_batches(make(prepared, seed=3), 6)
    assert same(first_batches(DataModule.of(config), 6), by_hand)
    assert not same(first_batches(DataModule.of(config, seed=4), 6), by_hand)


@pytest.mark.parametrize("num_workers", [1, 4])
def test_workers_do_not_change_the_batches(prepared, num_workers):
    plain = first_batches(make(prepared), 12)
    assert plain[0]["input_ids"].shape == (2, 16)
    assert same(first_batches(make(prepared, num_workers=num_workers), 12), plain)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_workers_outlive_the_signals_that_stop_a_run(prepared, number):
    """Also workers that inherit no handler, as those of a forkserver."""
    module = make(prepared, num_workers=1)
    first_batches(module, 0)
    initialise = module.train_dataloader().worker_init_fn
    assert initialise is not None
    reader, writer = os.pipe()
    if not (child := os.fork()):
        signal.signal(number, signal.SIG_DFL)
        initialise(0)
        os.write(writer, b"1")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    os.kill(child, number)
    time.sleep(0.05)
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "it lives on"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)


def test_two_ranks_take_the_steps_of_one(prepared):
    one = first_batches(make(prepared), 8)
    two = [first_batches(make(prepared), 4, global_rank=rank, world_size=2) for rank in range(2)]
    for step in range(4):
        rows = torch.cat([batch["input_ids"] for batch in one[2 * step : 2 * step + 2]])
        assert torch.equal(torch.cat([two[0][step]["input_ids"], two[1][step]["input_ids"]]), rows)


def test_starts_at_the_trainers_step(prepared):
    assert same(first_batches(make(prepared), 4, global_step=3), first_batches(make(prepared), 10)[6:])


class Recorder(lightning.LightningModule):
    """Trains one number and remembers what it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list]] = []
        self.validated: list[tuple[int, list]] = []

    def training_step(self, batch, _):
        self.seen.append((self.trainer.global_step, batch["input_ids"].tolist()))
        return (self.weight - batch["input_ids"].float().mean()) ** 2

    def validation_step(self, batch, _, dataloader_idx=0):
        self.validated.append((dataloader_idx, batch["input_ids"].tolist()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder, root, steps: int, checkpoint=None) -> tuple[Recorder, lightning.Trainer]:
    model = Recorder()
    trainer = lightning.Trainer(
        max_steps=steps,
        accumulate_grad_batches=2,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    validation = {"a": str(folder), "b": str(folder)}
    trainer.fit(model, make(folder, validation, validation_sequences=5), ckpt_path=checkpoint)
    return model, trainer


def test_resumed_training_sees_what_it_would_have_seen(prepared, tmp_path):
    whole, _ = fit(prepared, tmp_path, 7)
    assert [step for step, _ in whole.seen] == [s for s in range(7) for _ in range(2)]
    first, trainer = fit(prepared, tmp_path, 3)
    trainer.save_checkpoint(tmp_path / "3.ckpt")
    second, _ = fit(prepared, tmp_path, 7, tmp_path / "3.ckpt")
    assert first.seen + second.seen == whole.seen
    assert torch.equal(second.weight, whole.weight)
    assert {name for name, _ in whole.validated} == {0, 1}
    assert sum(len(rows) for name, rows in whole.validated if name == 0) % 5 == 0


def test_validation_sets(prepared):
    module = make(prepared)
    assert module.validation_names == ["validation"]
    totals = module.manifest.splits["validation"]
    assert module.bytes_per_token == {"validation": totals.bytes / totals.tokens}
    module = make(prepared, {"web": str(prepared), "code": str(prepared)}, validation_sequences=5)
    assert module.validation_names == ["web", "code"]
    loaders = module.val_dataloader()
    assert [[len(batch["labels"]) for batch in loader] for loader in loaders] == [[2, 2, 1]] * 2
    assert same(list(loaders[0]), list(loaders[0]))


def test_other_tokenizer_is_refused(prepared, tmp_path, run, recipe):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "w" * i}) + "\n" for i in range(1, 99)))
    _, other = run(recipe([tmp_path / "a.jsonl"], validation={"fraction": 0.5}))
    with pytest.raises(
        DataError, match=rf"{other}: validation set 'x' was made with another tokenizer than {prepared}"
    ):
        make(prepared, {"x": str(other)})


def test_model_vocabulary_must_hold_the_tokens(prepared):
    assert make(prepared, vocab_size=320).manifest.vocab_size == 320
    with pytest.raises(UserError, match=r"model\.vocab_size 319 is less than the 320 tokens"):
        make(prepared, vocab_size=319)


def test_folder_without_validation_split(tmp_path, run, recipe, documents):
    (tmp_path / "a.txt").write_text(" ".join(documents(20)))
    _, out = run(recipe([tmp_path / "a.txt"]))
    with pytest.raises(DataError, match="has no validation split, only train"):
        make(out)


def test_more_documents_than_kernels_have_room_for_are_refused_on_the_host():
    fits = torch.arange(128).expand(2, -1)  # 256 documents
    check_documents(fits)
    with pytest.raises(UserError, match=r"data\.document_mask: .* 384 documents, and kernels have room for 256"):
        check_documents(torch.arange(128).expand(3, -1))
