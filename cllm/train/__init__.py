"""Training: one run, from a config to a finished folder. Lightning runs the loop; see docs/architecture.md.

run.py                  `train`: opens the folder, builds everything, fits
launch.py               `Launch`: devices, strategy, precision and accumulation, resolved once
folder.py               the run's folder: new or resumed, and its first files
resume.py               settings that may change when a run is resumed, and the checkpoint to resume from
summary.py              sizes, costs and settings of a run, for summary.json and loggers
module.py               the training and validation step
uptraining.py           the step of uptraining, with a teacher
replay.py               forward and backward as one CUDA graph: train.cuda_graph
prepare.py              a decoder set up for training: recomputation, fp8, SwiGLU, compilation
float8.py               fp8 products
swiglu.py               kernels of feed-forward layers
optim.py                optimizers by name, and how other packages add one
muon.py                 Muon for matrices and AdamW for other weights
schedule.py             the learning rate
trainer.py              Lightning's Trainer
lightning_internals.py  every private part of Lightning that is touched
strategy.py             one device, DDP, ZeRO
reshard.py              ZeRO's shards read by another number of processes
loggers.py              loggers of Lightning by name: train.loggers
callbacks.py            callbacks of Lightning by import path: train.callbacks, and the metrics that they monitor
imports.py              classes by their import path, and their arguments
measure.py              the callback that measures
probes.py               measurements of the caller during training, such as suites
metrics.py              the writer of metrics: metrics.jsonl, TensorBoard, loggers
hparams.py              the row of a run in the HPARAMS tab of TensorBoard
breakdown.py            time of a step by part
throughput.py           the clock, and peak FLOP/s
checkpoints.py          when checkpoints are saved
best.py                 the checkpoints with the lowest validation losses
stop.py                 the end of a run, by its last step or a signal
ranks.py                the watch over other processes of a run
faults.py               faults of the machine as one line
dryrun.py               the plan, its size and its cost, without training
budget.py               the tokens of a run against its data and the clock
speed.py                the speed of an earlier run like a planned one

Imports everything except evaluate and posthoc.
"""
