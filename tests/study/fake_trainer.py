"""A trainer without torch, for tests of the runner: it saves, resumes, stops on SIGTERM and locks as `cllm train` does.

    python -S fake_trainer.py train RUN CONFIG STEPS TOKENS_PER_STEP SEED LR SECONDS [STARTED N]
    python -S fake_trainer.py evaluate RUN OUT MARK

With STARTED, a file with a line for each training that was started, a run takes its last step only once the next one
of N was started, or after half a minute fails.

Its loss depends on every step, the seed and the learning rate, so a lost or doubled step changes it.
"""

import fcntl
import json
import os
import signal
import sys
import time


def write(path: str, text: str) -> None:
    with open(path + ".tmp", "w") as file:
        file.write(text)
    os.replace(path + ".tmp", path)


def newest(folder: str) -> int:
    return max((int(name[5:13]) for name in os.listdir(folder) if name.endswith(".ckpt")), default=0)


def train(
    run: str, config: str, steps: int, per_step: int, seed: int, lr: float, seconds: float, started: "tuple[str, ...]"
) -> int:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    os.makedirs(f"{run}/checkpoints", exist_ok=True)
    lock = os.path.join(os.path.dirname(run), f".{os.path.basename(run)}.lock")
    busy = os.open(lock, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        print(f"{run}: is in use by another process")
        return 2
    with open("/proc/sys/kernel/random/boot_id") as file:
        os.pwrite(busy, json.dumps({"host": "here", "boot": file.read().strip(), "pid": os.getpid()}).encode(), 0)
    try:
        return steps_of(run, config, steps, per_step, seed, lr, seconds, stopped, started)
    finally:
        os.unlink(lock)


def steps_of(
    run: str,
    config: str,
    steps: int,
    per_step: int,
    seed: int,
    lr: float,
    seconds: float,
    stopped: list[int],
    started: "tuple[str, ...]",
) -> int:
    checkpoints, rows = f"{run}/checkpoints", f"{run}/metrics.jsonl"
    with open(config) as file:
        write(f"{run}/config.yaml", file.read())
    summary = {"kv_bytes_per_token": {"resident": 64.0, "read": 64.0}, "kv_vs_mha": {"resident": 1.0, "read": 1.0}}
    write(f"{run}/summary.json", json.dumps({"design": "mha", "parameters": 1000, **summary}))
    write(f"{run}/env.txt", "python: 3\ncommit: abc\ncommand: x\n")
    begin = newest(checkpoints)
    state = seed
    if begin:
        with open(f"{checkpoints}/step-{begin:08d}.ckpt") as file:
            state = int(file.read())
    kept = []
    if os.path.exists(rows):
        with open(rows) as file:
            kept = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= begin]
    write(rows, "".join(kept))
    with open(rows, "a", buffering=1) as log:
        for step in range(begin + 1, steps + 1):
            time.sleep(seconds)
            if step == steps and started and not wait_for_next(run, started, stopped):
                return 9
            if stopped and step == steps and started:
                step -= 1
                write(f"{checkpoints}/step-{step:08d}.ckpt", str(state))
                return 3
            state = (state * 6364136223846793005 + step) % 2**64
            row = {"step": step, "tokens": step * per_step, "train/loss": 3.0, "throughput/tokens_per_s": 1000.0}
            row["time"] = time.time()
            if step % 3 == 0 or step == steps:
                row["val/loss"] = 2 + abs(lr - 0.002) * 100 + state / 2**64 / 100
            log.write(json.dumps(row) + "\n")
            if step % 4 == 0 or step == steps or stopped:
                write(f"{checkpoints}/step-{step:08d}.ckpt", str(state))
            if stopped and step < steps:
                return 3
    return 0


def wait_for_next(run: str, started: "tuple[str, ...]", stopped: list[int]) -> bool:
    """Wait for the start of the run after this one. False if it does not come."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with open(started[0]) as file:
            names = file.read().split()
        if stopped or names[-1] != os.path.basename(run) or len(set(names)) == int(started[1]):
            return True
        time.sleep(0.002)
    return False


def evaluate(run: str, out: str, mark: str) -> int:
    os.makedirs(f"{out}/00", exist_ok=True)
    with open(f"{run}/checkpoints/step-{newest(run + '/checkpoints'):08d}.ckpt") as file:
        loss = int(file.read()) / 2**64
    write(f"{out}/00/set.json", json.dumps({"run": "x", "set": "set", "loss": loss, "perplexity": 2.0}))
    write(f"{out}/00.done", mark + "\n")
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "evaluate":
        sys.exit(evaluate(*sys.argv[2:5]))
    folder, settings, *numbers = sys.argv[2:]
    sys.exit(train(folder, settings, *map(int, numbers[:3]), *map(float, numbers[3:5]), tuple(numbers[5:])))
