"""Latents of several blocks (MLRA): shapes, counts, the split over devices, and refusals."""

import pytest
import torch

from cllm.cache.cache import KVCache
from cllm.config import ModelConfig
from cllm.config.load import validate
from cllm.errors import UserError
from cllm.model.decoder import Decoder
from cllm.model.sizes import count_parameters, layer_flops_per_token
from cllm.plan.plan import Latent
from cllm.uptrain.svd import check_latents

SHAPE = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}


def test_one_block_is_mla_and_four_have_its_weights_and_three_more_attentions(tiny_config):
    mla = tiny_config(kv={"preset": "mla", **SHAPE})
    assert tiny_config(kv={"preset": "mlra", "blocks": 1, **SHAPE}).plan() == mla.plan()
    mlra = tiny_config(kv={"preset": "mlra", **SHAPE})
    one, four = Decoder(mla), Decoder(mlra)
    assert count_parameters(four) == count_parameters(one)
    seen = (16 + 1) / 2  # tokens of 16 that a query sees on average
    attention = 2 * 4 * (6 + 4 + 5) * seen  # of one block: 4 heads with keys of 6 + 4 channels and values of 5
    more = [b - a for a, b in zip(*(layer_flops_per_token(m, 16) for m in (one, four)), strict=True)]
    assert more == pytest.approx([3 * attention] * 8)
    assert mlra.plan().owned(0).text == "latent 4 x 3 + 4"


def test_the_default_is_the_published_shape():
    config = ModelConfig(d_model=3072, n_layers=2, n_heads=24, head_dim=128, kv={"preset": "mlra", "q_lora_rank": 1024})
    latent = config.plan().reading(Latent)[0]
    assert (latent.blocks, latent.kv_lora_rank, latent.qk_rope_head_dim) == (4, 512, 64)
    assert latent.widths(128) == ((512,), (64,))


@pytest.mark.parametrize("decodes", [False, True])
def test_devices_that_have_some_blocks_each_add_up_to_the_layer(decodes, tiny_config, random_model):
    """A device needs the norm, the up-projection and the cached channels of its blocks, and the RoPE key."""
    model = random_model(tiny_config(n_layers=1, kv={"preset": "mlra", **SHAPE}))
    attention = model.blocks[0].attention
    outputs = []
    attention.o_proj.register_forward_hook(lambda module, args, out: outputs.append(out))

    def run() -> torch.Tensor:
        ids = torch.arange(5)[None]
        outputs.clear()
        with torch.no_grad():
            if decodes:
                cache = KVCache(model.config)
                model(ids[:, :4], cache=cache)
                model(ids[:, 4:], cache=cache)
            else:
                model(ids)
        return outputs[-1][:, -1]

    whole, total = run(), torch.zeros(())
    values = [up.weight.unflatten(0, (4, 11))[:, 6:] for up in attention.up_projections]  # 4 heads of 5
    kept = [value.detach().clone() for value in values]
    norms = attention.owner.norm.weight.detach().clone()
    for device in ((0, 3), (1, 2)):
        with torch.no_grad():
            for block, value in enumerate(values):
                value.copy_(kept[block] if block in device else 0 * kept[block])
                mine = norms.unflatten(0, (4, 3))[block]
                attention.owner.norm.weight[3 * block : 3 * block + 3] = mine if block in device else 0
        total = total + run()
    torch.testing.assert_close(total, whole)


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        (
            {"preset": "mlra", "blocks": 5},
            r"layer 0: blocks is 5 and kv_lora_rank 32; allowed: a number of blocks that",
        ),
        ({"layers": [{"layers": "0-7", "latent": {**SHAPE, "blocks": 8}}]}, "layer 0: blocks is 8 and kv_lora_rank 12"),
        ({"preset": "mlra", "blocks": 0}, r"kv\.blocks"),
        ({"preset": "mla", "blocks": 2}, r"kv\.blocks"),
    ],
)
def test_blocks_that_make_no_sense_are_refused(kv, message):
    with pytest.raises(UserError, match=message):
        validate(ModelConfig, {"d_model": 32, "n_layers": 8, "n_heads": 4, "kv": kv})


def test_a_teacher_gives_no_blocks(tiny_config):
    student = Decoder(tiny_config(kv={"preset": "mlra", **SHAPE}))
    with pytest.raises(UserError, match=r"svd: layer 0: a latent has 4 blocks; allowed: 1, since the softmax"):
        check_latents(student, Decoder(tiny_config()), calibrated=True)
