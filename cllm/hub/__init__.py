"""Models in the Hugging Face format: exported, imported, loaded, and used through transformers.

kind.py        the kind of a path: a run, a checkpoint, an exported folder, a foreign one, or nothing
open.py        the config and the weights of the model in any such path
config.py      `CLLMConfig`: config.json, with the `model` section and transformers' names for its keys
base.py        `CLLMModel`, the base model, and the part that both transformers classes share
model.py       `CLLMForCausalLM`: logits and loss
inputs.py      attention masks and position ids as padding, positions and documents
generation.py  `generate` over a `KVCache`
batching.py    continuous batching over transformers' paged cache
serving.py     `transformers serve` for folders of this package
loading.py     models in checkpoint folders, loaded without code and with every tensor accounted for
export.py      from a run to a checkpoint folder
card.py        the model card of a folder that is written
push.py        upload of a folder to the Hub
exchange.py    from another family's folder to one of this package, and back
companions.py  tokenizer, chat templates, generation config and licence
checksums.py   SHA-256 of weight files
peft.py        PEFT's tables of models
families/      checkpoints of Llama, Mistral, Qwen, Gemma and DeepSeek

Imports data, runs, the model, the cache, and everything below them. `import cllm` registers the classes lazily.
"""
