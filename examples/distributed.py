r"""Many processes on shards of unequal length, with the loss of one process.

A small model predicts the next byte of Python's standard library. Its data comes in shards,
some with several times the examples of others, and every process reads its own alone. A shard
that has run out gives rows whose targets are ignored: the mean of the loss is over the examples
that count, wherever they are. Processes talk through `jax.distributed`, JAX's own runtime, and
on CPUs through gloo. From the repository, on one machine:

    python examples/distributed.py
    python examples/distributed.py --checkpoint checkpoints --resume

The first starts two processes of four CPU devices, trains, evaluates, does the same in one
process of eight devices, and compares. The second saves the training as it goes, and continues
after an interruption. On a cluster, start this once on every machine, with I from 0 to 3:

    python examples/distributed.py --coordinator HOST0:1234 --num-processes 4 --process-id I \
        --checkpoint /shared/checkpoints --resume

or, where JAX finds all three by itself (Slurm, Open MPI, Kubernetes, Cloud TPU):

    srun python examples/distributed.py --cluster --checkpoint /shared/checkpoints --resume

Expect the two runs to agree to a few units in the last place of float32, and the mean of the
devices' own means, printed beside the right one, to be another number. Kill a process, and
expect the others to end with an error: on a cluster within some ten seconds, when JAX takes it
for dead, on one machine at once. Start them again, and expect the loss of a run that was never
interrupted, to the last bit where the processes and devices are as many as before.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from random import Random
from sysconfig import get_paths
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxent

SHARDS = 4  # files of the data; the number of processes divides it
LONGEST_FILE = 20_000  # bytes
IGNORED = -100
CONTEXT, EMBEDDING, WIDTH, BYTES = 8, 16, 128, 256
ROWS = 512  # of a batch, from every shard; with SHARDS, a multiple of the number of devices
STEPS, SAVE_EVERY = 60, 10
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.2, momentum=0.9))
PROCESSES, DEVICES = 2, 4  # on one machine
HEARTBEAT, SHUTDOWN = 10, 30  # seconds without a sign of life, and for the others to finish
TOLERANCE = 8  # ulp: one for each device's part of the sum


def read_shard(shard):
    """Windows of a shard to train on and held out, (N, CONTEXT + 1); the last byte is the target.

    The first shard has a file, the second two, and so on.
    """
    library = Path(get_paths()["stdlib"])
    paths = sorted(p for p in library.rglob("*.py") if "site-packages" not in p.parts)
    paths = [p for p in paths if CONTEXT < p.stat().st_size <= LONGEST_FILE]
    Random(0).shuffle(paths)
    text = b"".join(p.read_bytes() for p in paths[shard::SHARDS][: shard + 1])
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(text, np.uint8), CONTEXT + 1)
    train, held_out = np.split(windows.astype(np.int32), [len(windows) * 9 // 10])
    return np.random.default_rng(shard).permutation(train), held_out


def as_global(pieces, rows):
    """One array over all processes, of a piece from each shard, padded to so many rows."""
    padding = np.array([0] * CONTEXT + [IGNORED], np.int32)
    local = np.tile(padding, (len(pieces), rows, 1))
    for row, piece in zip(local, pieces):
        row[: len(piece)] = piece
    sharding = NamedSharding(jax.sharding.get_mesh(), P("data"))
    return jax.make_array_from_process_local_data(sharding, local.reshape(-1, CONTEXT + 1))


def count_batches(shards):
    """Batches until the longest shard has run out, the other processes' included."""
    batches = -(-max(map(len, shards)) // ROWS)
    return int(np.max(multihost_utils.process_allgather(np.array(batches))))


def create(key):
    keys, init = jax.random.split(key, 3), jax.nn.initializers.lecun_normal()
    params = {
        "embedding": jax.random.normal(keys[0], (BYTES, EMBEDDING)),
        "kernel": init(keys[1], (CONTEXT * EMBEDDING, WIDTH)),
        "head": init(keys[2], (WIDTH, BYTES)),
    }
    return params, OPTIMIZER.init(params)


def read_out(params, windows):
    """What the loss takes: hidden states, split over the devices, the head, and the targets."""
    contexts, targets = windows[:, :-1], windows[:, -1]
    x = params["embedding"].at[contexts].get(out_sharding=P("data", None, None))
    x = x.reshape(len(contexts), CONTEXT * EMBEDDING)
    return jnp.tanh(x @ params["kernel"]), params["head"], targets


@jax.jit
def train_step(state, windows):
    params, momentum = state
    # The mesh is explicit: the type of the hidden states says how the examples are split.
    loss, grads = jax.value_and_grad(
        lambda params: jaxent.linear_cross_entropy(*read_out(params, windows))
    )(params)
    updates, momentum = OPTIMIZER.update(grads, momentum, params)
    return (optax.apply_updates(params, updates), momentum), loss


@jax.jit
def evaluate(params, windows):
    """Loss and accuracy over the examples that count, and what looks like the loss but is not."""
    hidden, head, targets = read_out(params, windows)
    loss = jaxent.linear_cross_entropy(hidden, head, targets)
    correct = jaxent.linear_token_stats(hidden, head, targets).correct
    mean_of_means = jax.shard_map(
        lambda *own: jax.lax.pmean(jaxent.linear_cross_entropy(*own), "data"),
        in_specs=(P("data"), P(), P("data")),
        out_specs=P(),
    )
    accuracy = jnp.mean(correct, where=targets != IGNORED)
    return loss, accuracy, mean_of_means(hidden, head, targets)


def open_checkpoints(args):
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, save_interval_steps=args.save_every, enable_async_checkpointing=False
    )
    checkpoints = ocp.CheckpointManager(args.checkpoint.resolve(), options=options)
    if checkpoints.latest_step() is not None and not args.resume:
        raise SystemExit(f"{args.checkpoint} has checkpoints: continue them with --resume")
    return checkpoints


def train_and_evaluate(args):
    """What every process runs: on its own shards and devices, the same steps at the same time."""
    me, count = jax.process_index(), jax.process_count()
    if SHARDS % count:
        raise SystemExit(f"{SHARDS} shards cannot be divided among {count} processes")
    own = range(SHARDS)[me * SHARDS // count : (me + 1) * SHARDS // count]
    train, held_out = zip(*map(read_shard, own))
    print(
        f"process {me} of {count}: pid {os.getpid()}, {jax.local_device_count()} devices,"
        f" {sum(map(len, train))} examples to train on, {sum(map(len, held_out))} held out",
        flush=True,
    )
    epoch = count_batches(train)

    replicated = NamedSharding(jax.sharding.get_mesh(), P())
    state = jax.jit(create, out_shardings=replicated)(jax.random.key(0))
    first, losses = 0, {}
    checkpoints = args.checkpoint and open_checkpoints(args)
    if checkpoints and checkpoints.latest_step() is not None:
        first = checkpoints.latest_step()
        state = checkpoints.restore(first, args=ocp.args.StandardRestore(state))
    for step in range(first + 1, args.steps + 1):
        start = (step - 1) % epoch * ROWS
        batch = as_global([windows[start : start + ROWS] for windows in train], ROWS)
        state, loss = train_step(state, batch)
        losses[step] = float(loss)
        if checkpoints:
            saved = ocp.args.StandardSave(state)
            checkpoints.save(step, args=saved, force=step == args.steps)
        if me == 0 and step % args.save_every == 0:
            print(f"step {step}: loss {losses[step]:.6f}", flush=True)

    rows = count_batches(held_out) * ROWS
    loss, accuracy, mean_of_means = map(float, evaluate(state[0], as_global(held_out, rows)))
    if me == 0:
        print(
            f"held out: loss {loss:.6f}, accuracy {accuracy:.2%}"
            f" (the mean of the devices' means: {mean_of_means:.6f})",
            flush=True,
        )
    if me == 0 and args.out:
        names = "losses", "held-out loss", "accuracy", "mean of means"
        args.out.write_text(json.dumps(dict(zip(names, (losses, loss, accuracy, mean_of_means)))))


def join(args):
    """Join the other processes, and do one's share."""
    if args.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        args.coordinator,
        args.num_processes,
        args.process_id,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=SHUTDOWN,
    )
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        train_and_evaluate(args)


def launch(count, devices, *options):
    """Run so many processes on this machine; where one fails, end the others, and fail."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, __file__, "--coordinator", coordinator]
    command += ["--num-processes", str(count), "--devices", str(devices), *options]
    processes = [subprocess.Popen([*command, "--process-id", str(i)]) for i in range(count)]
    try:
        codes = [None]
        while None in codes and not any(codes):
            time.sleep(0.1)
            codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(codes):
        failed = [f"process {i} (exit status {code})" for i, code in enumerate(codes) if code]
        raise SystemExit(f"Failed: {', '.join(failed)}")


def units_apart(result, whole):
    """The largest difference of the losses, those of the steps in `result`, in ulp."""
    pairs = [(loss, whole["losses"][step]) for step, loss in result["losses"].items()]
    pairs.append((result["held-out loss"], whole["held-out loss"]))
    a, b = np.array(pairs, np.float32).T
    return np.max(np.abs(a - b) / np.spacing(np.maximum(a, b)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="save the training here")
    parser.add_argument("--save-every", type=int, default=SAVE_EVERY, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="continue from --checkpoint")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the losses here, as JSON")
    parser.add_argument("--devices", type=int, help="CPU devices of a process")
    here = parser.add_argument_group("on one machine")
    here.add_argument("--processes", type=int, default=PROCESSES)
    here.add_argument("--compare", action=argparse.BooleanOptionalAction, default=True)
    many = parser.add_argument_group("a process among others")
    many.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
    many.add_argument("--num-processes", type=int)
    many.add_argument("--process-id", type=int)
    many.add_argument("--cluster", action="store_true", help="let JAX find these three")
    args = parser.parse_args()
    if args.resume and not args.checkpoint:
        parser.error("--resume needs --checkpoint")
    if args.coordinator or args.cluster:
        return join(args)

    devices = args.devices or DEVICES
    options = ["--steps", str(args.steps), "--save-every", str(args.save_every)]
    with TemporaryDirectory() as folder:
        out, one = args.out or Path(folder, "many.json"), Path(folder, "one.json")
        own = ["--checkpoint", str(args.checkpoint)] if args.checkpoint else []
        own += ["--resume"] if args.resume else []
        launch(args.processes, devices, *options, *own, "--out", str(out))
        if not args.compare:
            return
        launch(1, args.processes * devices, *options, "--out", str(one))
        units = units_apart(*(json.loads(path.read_text()) for path in (out, one)))
    print(f"The losses of {args.processes} processes and of one differ by {units:.0f} ulp at most.")
    if not units <= TOLERANCE:
        raise SystemExit(f"That is more than {TOLERANCE}.")


if __name__ == "__main__":
    main()
