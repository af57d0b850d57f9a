"""One line for a mistake of the user's, a traceback for a bug."""

import errno
import io
import os
import sys

import pytest
import torch

from cllm.errors import LONGEST_LINE, DataError, PlanError, UserError, nearest, one_line


@pytest.mark.parametrize("error", [UserError, PlanError, DataError])
def test_a_user_error_is_one_line_on_stderr_and_status_2(error, capsys):
    @one_line
    def command():
        raise error("layer 3: reads\n  layer 9,   which is not there")

    assert command() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: layer 3: reads layer 9, which is not there\n"


class _Refused(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> int:
        raise DataError("a.bin: holds token 9, but the model has tokens 0 to 7")


def test_a_user_error_of_a_data_loaders_process_is_one_line_too(capsys):
    @one_line
    def command():
        next(iter(torch.utils.data.DataLoader(_Refused(), num_workers=1)))

    assert command() == 2
    assert capsys.readouterr().err == "error: a.bin: holds token 9, but the model has tokens 0 to 7\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: cannot be written: No space left on device"),
        (MemoryError("Unable to allocate 2 TiB"), "out of memory: Unable to allocate 2 TiB"),
    ],
)
def test_a_fault_of_the_machine_is_one_line_too(error, line, capsys):
    @one_line
    def command():
        raise error

    assert command() == 2
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(("said", "line"), [((), "interrupted"), (("stopped; run it again",), "stopped; run it again")])
def test_ctrl_c_is_one_line_and_status_130(said, line, capsys):
    @one_line
    def command():
        raise KeyboardInterrupt(*said)

    assert command() == 130
    assert capsys.readouterr().err == f"{line}\n"


def test_output_that_nobody_reads_ends_a_command_quietly(monkeypatch, capsys):
    @one_line
    def command():
        print("a table")

    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert command() == 141
    assert capsys.readouterr().err == ""


def test_a_path_that_the_terminal_cannot_show_is_printed_all_the_same(monkeypatch):
    @one_line
    def command():
        print("written: caf\udce9 × ∞")

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    assert command() == 0
    assert raw.getvalue() == b"written: caf\\udce9 \xd7 \\u221e\n"


def test_a_broken_pipe_to_something_else_is_no_quiet_end():
    @one_line
    def command():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        command()


def test_a_line_of_many_characters_loses_its_middle(capsys):
    @one_line
    def command():
        raise UserError("first " + "x" * 20_000 + " last")

    assert command() == 2
    line = capsys.readouterr().err
    assert len(line) <= LONGEST_LINE + len("error: \n")
    assert line.startswith("error: first xxx")
    assert line.endswith("xxx last\n")


def test_a_bug_keeps_its_traceback():
    @one_line
    def command():
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        command()


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (3, 3)])
def test_status_of_a_command_that_raises_nothing(returned, status):
    assert one_line(lambda: returned)() == status


def test_arguments_and_name_pass_through():
    @one_line
    def main(a, *, b):
        return a + b

    assert main(1, b=2) == 3
    assert main.__name__ == "main"


def test_nearest_names_a_close_word_alone():
    assert nearest("fusedkv_light", ["mha", "fusedkv_lite", "fusedkv"]) == 'did you mean "fusedkv_lite"?'


KEYS = ["decay_fraction", "eps", "lr", "min_lr", "warmup_steps", "weight_decay"]


@pytest.mark.parametrize(
    ("word", "allowed", "meant"),
    [
        ("MHA", ["mha", "mla", "yoco"], "mha"),
        ("FusedKV-Lite", ["fusedkv", "fusedkv_lite"], "fusedkv_lite"),
        ("learning_rate", KEYS, "lr"),
        ("Learning-Rate", KEYS, "lr"),
        ("wd", KEYS, "weight_decay"),
        ("ws", KEYS, "warmup_steps"),
        ("min_learning_rate", KEYS, "min_lr"),
        ("batch_size", ["global_batch", "micro_batch"], "global_batch"),
        ("hidden_size", ["d_ff", "d_model", "head_dim"], "d_model"),
        ("num_hidden_layers", ["n_heads", "n_layers"], "n_layers"),
        ("num_layers", ["n_heads", "n_layers"], "n_layers"),
        ("seq_length", ["path", "seq_len"], "seq_len"),
        ("epochs", ["log_every", "steps"], "steps"),
    ],
)
def test_nearest_knows_case_abbreviations_and_the_words_of_other_projects(word, allowed, meant):
    assert nearest(word, allowed) == f'did you mean "{meant}"?'


def test_nearest_lists_everything_where_nothing_is_close():
    assert nearest("zzz", ["mha", "gqa", "lizard"]).endswith("allowed: gqa, lizard, mha")


def test_nearest_of_nothing():
    assert nearest("x", []) == "none is allowed here"
