"""Uptraining: a trained model turned into another KV plan and trained a little.

settings.py    what YAML may say under `init:` and `uptrain:`
teacher.py     the model that `init.from` names, and the student's config that follows from it
init.py        the student's first weights, training-free: which step does what
project.py     K/V projections copied or averaged
heads.py       KV heads of two layers matched, and the layer rewritten so that its function stays
assign.py      the best matching of two sets, exactly
calibrate.py   what the teacher's layers see and say on a calibration text
fit.py         least squares: fusion weights, and shared projections
svd.py         latents for MLA: partial RoPE and a joint SVD
search.py      plans from measured similarity
decoder.py     a decoder whose layers can be listened to and read at random
loss.py        distillation, logits a chunk at a time
trainable.py   what is trained: all, K/V, or LoRA
curriculum.py  from own keys and values to shared ones
student.py     `Student`: everything that training needs, in one object
"""
