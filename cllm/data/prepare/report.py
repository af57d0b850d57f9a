"""A prepared folder in a few lines."""

from __future__ import annotations

from cllm.data.manifest import Manifest


def summary(manifest: Manifest) -> str:
    """A table of the splits, the tokenizer, and whatever was replaced or left out."""
    lines = [f"{manifest.folder}", f"{'split':<12}{'documents':>14}{'tokens':>18}{'shards':>8}{'bytes/token':>13}"]
    for name, split in manifest.splits.items():
        lines.append(
            f"{name:<12}{split.documents:>14,}{split.tokens:>18,}{len(split.shards):>8,}"
            f"{manifest.bytes_per_token(name):>13.3f}"
        )
    lines.append(f"tokenizer: {manifest.vocab_size:,} tokens, EOS {manifest.eos_id}, stored as {manifest.dtype}")
    counts = manifest.counts
    if counts.invalid_utf8_documents:
        lines.append(
            f"not UTF-8: {counts.invalid_utf8_documents:,} documents; "
            f"{counts.replaced_sequences:,} byte sequences were replaced by U+FFFD"
        )
    left_out = ((counts.empty_documents, "empty"), (counts.short_documents, "shorter than min_chars"))
    lines += [f"left out: {n:,} {what} documents" for n, what in left_out if n]
    return "\n".join(lines)
