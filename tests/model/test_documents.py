"""Documents packed into one row do not influence each other."""

import pytest
import torch

from cllm.plan.presets import preset_names

LENGTHS = [[5, 1, 7], [2, 9, 2]]


def packed():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(32, (2, 13), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS])
    documents = torch.stack([torch.repeat_interleave(torch.tensor([3, 4, 9]), torch.tensor(n)) for n in LENGTHS])
    return ids, positions, documents


@pytest.mark.parametrize("name", [*preset_names(), "yoco with retention", "mla, full-rank queries"])
def test_packed_documents_have_the_logits_of_each_alone(name, preset_config, random_model):
    model = random_model(preset_config(name, qk_norm=True))
    ids, positions, documents = packed()
    with torch.no_grad():
        logits = model(ids, positions, documents)
        for row, lengths in enumerate(LENGTHS):
            start = 0
            for n in lengths:
                alone = model(ids[row : row + 1, start : start + n])[0]
                torch.testing.assert_close(logits[row, start : start + n], alone, atol=2e-5, rtol=1e-4)
                start += n


@pytest.mark.parametrize("name", ["mha", "yoco", "yoco with retention", "fusedkv", "lckv"])
def test_without_document_ids_a_row_is_one_document(name, preset_config, random_model):
    model = random_model(preset_config(name))
    ids, _, documents = packed()
    with torch.no_grad():
        one = model(ids, document_ids=torch.zeros_like(ids))
        torch.testing.assert_close(model(ids), one, atol=1e-5, rtol=1e-5)
        assert (model(ids) - model(ids, document_ids=documents)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["fusedkv", "yoco with retention", "lckv"])
def test_gradients_of_packed_documents_are_the_sum_over_documents(name, preset_config, random_model):
    model = random_model(preset_config(name))
    ids, positions, documents = packed()
    probe = torch.randn(2, 13, 32, generator=torch.Generator().manual_seed(1))
    (model(ids, positions, documents) * probe).sum().backward()
    together = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    for row, lengths in enumerate(LENGTHS):
        parts = zip(ids[row].split(lengths), probe[row].split(lengths), strict=True)
        sum((model(part[None])[0] * weight).sum() for part, weight in parts).backward()
    for key, parameter in model.named_parameters():
        error = (together[key] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-3, f"{key}: {error:.1e}"
