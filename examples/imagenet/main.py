"""Train an ImageNet classifier: the command line of the PyTorch ImageNet example, with our Loader.

    python main.py DATA -a resnet50                              # one GPU, or the CPU without one
    torchrun --nproc_per_node=8 main.py DATA -a resnet50         # the eight GPUs of a node
    python main.py DATA -a resnet50 --resume checkpoint.pth.tar  # go on where a run was stopped

DATA holds train/ and val/: class folders as in the PyTorch example, or what 'imagenet-seq pack'
made of them. README.md beside this file says what differs from the PyTorch example.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import time
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import models
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from imagenet_seq.loader import Loader

CHECKPOINT = "checkpoint.pth.tar"
BEST_CHECKPOINT = "model_best.pth.tar"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="PyTorch ImageNet training with imagenet_seq")
    add = parser.add_argument
    known = " ".join(models.names())
    data = "folder with train/ and val/, class folders or packs (default: $IMAGENET)"
    workers = "threads that decode, shared by the ranks of a node (default: 0, one for every core)"
    batch_size = "samples of a batch, shared by the ranks of a node (default: 256)"
    amp = "mixed precision; auto: on a GPU bfloat16 where it has that, else float16 (default: auto)"
    add("data", metavar="DATA", nargs="?", default=os.environ.get("IMAGENET"), help=data)
    add("-a", "--arch", default="resnet18", choices=models.names(), metavar="ARCH", help=known)
    add("-j", "--workers", type=int, default=0, metavar="N", help=workers)
    add("--epochs", type=int, default=90, metavar="N", help="epochs in total (default: 90)")
    add("--start-epoch", type=int, default=0, metavar="N", help="first epoch (default: 0)")
    add("-b", "--batch-size", type=int, default=256, metavar="N", help=batch_size)
    add("--lr", "--learning-rate", type=float, default=0.1, help="initial rate (default: 0.1)")
    add("--lr-step", type=int, default=30, metavar="N", help="epochs between its tenfold drops")
    add("--momentum", type=float, default=0.9, metavar="M", help="momentum (default: 0.9)")
    add("--wd", "--weight-decay", type=float, default=1e-4, metavar="W", help="(default: 1e-4)")
    add("-p", "--print-freq", type=int, default=10, metavar="N", help="batches between two lines")
    add("--resume", metavar="PATH", help="checkpoint to continue from, also in mid-epoch")
    add("-e", "--evaluate", action="store_true", help="validate the model and end")
    add("--pretrained", action="store_true", help="start from torchvision's trained weights")
    add("--seed", type=int, help="make training reproducible")
    add("--gpu", type=int, metavar="ID", help="the GPU to use (default: that of the local rank)")
    add("--no-accel", action="store_true", help="train on the CPU even where there is a GPU")
    add("--amp", choices=("auto", "off", "float16", "bfloat16"), default="auto", help=amp)
    add("--save-freq", type=int, metavar="N", help="save every N batches, not only every epoch")
    add("--output", type=Path, default=Path(), metavar="DIR", help="folder for checkpoints")
    args = parser.parse_args(argv)
    if args.data is None:
        parser.error(
            "where is the data? Give DATA or set IMAGENET to a folder with train/ and val/"
        )
    if args.resume and not os.path.isfile(args.resume):
        parser.error(f"no checkpoint {args.resume!r}; leave out --resume to start from scratch")
    if args.batch_size % Ranks.from_environment().local_world_size:
        parser.error(f"--batch-size {args.batch_size} doesn't divide among the ranks of this node")
    return args


class Ranks(NamedTuple):
    """The place of this process among torchrun's; the only one without torchrun."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @staticmethod
    def from_environment() -> Ranks:
        defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        return Ranks(*(int(os.environ.get(name, value)) for name, value in defaults.items()))

    @property
    def distributed(self) -> bool:
        return self.world_size > 1


def choose_device(args: argparse.Namespace, ranks: Ranks) -> torch.device:
    if args.no_accel or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", ranks.local_rank if args.gpu is None else args.gpu)
    torch.cuda.set_device(device)
    return device


def choose_amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision, or None for float32 throughout."""
    if amp == "off" or (amp == "auto" and device.type == "cpu"):
        return None
    if amp == "auto":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}[amp]


class Counts:
    """Sums over the samples of an epoch, kept on the device: adding to them waits for no GPU."""

    def __init__(self, device: torch.device) -> None:
        # Loss, hits of the first guess, hits of the best five, samples. Exact up to 2**53.
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, loss_sum: Tensor, output: Tensor, target: Tensor) -> None:
        hits = output.topk(min(5, output.shape[1])).indices == target[:, None]
        num_samples = torch.tensor(len(target), device=output.device)
        parts = (loss_sum, hits[:, 0].sum(), hits.sum(), num_samples)
        self.sums += torch.stack([part.double() for part in parts])

    def total(self) -> Totals:
        """The sums over all ranks. Every rank must ask."""
        total = self.sums.clone()
        if dist.is_initialized():
            dist.all_reduce(total)
        return Totals(*total.tolist())


class Totals(NamedTuple):
    loss: float
    correct1: float
    correct5: float
    num_samples: float

    def __str__(self) -> str:
        return f"Loss {self.mean_loss:.4e}  Acc@1 {self.acc1:6.2f}  Acc@5 {self.acc5:6.2f}"

    @property
    def mean_loss(self) -> float:
        return self.loss / self.num_samples

    @property
    def acc1(self) -> float:
        return 100 * self.correct1 / self.num_samples

    @property
    def acc5(self) -> float:
        return 100 * self.correct5 / self.num_samples


class StopRequest:
    """While entered, notes SIGTERM and Ctrl-C, so that training can stop between two batches."""

    def __init__(self) -> None:
        self._signal_number = 0

    def _note(self, signal_number: int, _frame: FrameType | None) -> None:
        self._signal_number = signal_number

    def __enter__(self) -> None:
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._former_handlers = {number: signal.signal(number, self._note) for number in numbers}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)

    def agreed_signal(self) -> int:
        """The signal that any rank has got, or 0. Every rank must ask.

        The ranks get a signal at different batches but must stop at the same one. The tensor lies
        on the CPU, so that asking waits for no GPU.
        """
        number = torch.tensor(self._signal_number)
        if dist.is_initialized():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)


class Training:
    """A model on its way through the epochs, with all that a checkpoint must hold of it."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks) -> None:
        self.args = args
        self.ranks = ranks
        self.device = choose_device(args, ranks)
        self.on_gpu = self.device.type == "cuda"
        # Tensor cores want channels last; the loader writes its batches that way.
        self.memory_format = torch.channels_last if self.on_gpu else torch.contiguous_format
        self.amp_dtype = choose_amp_dtype(args.amp, self.device)
        self.stop = StopRequest()

        self.epoch = args.start_epoch
        self.num_batches = 0  # done of this epoch
        self.trained = False  # this epoch's training is done, its validation is not
        self.counts = Counts(self.device)
        self.best_acc1 = 0.0

        if ranks.distributed:
            # Both backends: the stop signal and the random states go from CPU to CPU.
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.on_gpu else "gloo")
        if args.seed is not None:
            torch.manual_seed(args.seed + ranks.rank)
        torch.backends.cudnn.deterministic = args.seed is not None
        torch.backends.cudnn.benchmark = args.seed is None
        self._make_loaders()
        self._make_model()
        if args.resume:
            self._resume()

    def say(self, text: str) -> None:
        if self.ranks.rank == 0:
            print(text, flush=True)

    def _make_loaders(self) -> None:
        args, num_local = self.args, self.ranks.local_world_size
        options = {
            "batch_size": args.batch_size // num_local,
            "num_workers": -(-args.workers // num_local),
            "device": self.device,
            "memory_format": self.memory_format,
        }
        self.val_loader = Loader(args.data, "val", **options)
        if not args.evaluate:
            # The changed line. A script of your own needs no more of it than
            #   train_loader = Loader(args.data, "train", batch_size=args.batch_size,
            #                         num_workers=args.workers)
            # for its ImageFolder, transforms, DistributedSampler and DataLoader.
            self.train_loader = Loader(args.data, "train", seed=args.seed or 0, **options)

    def _make_model(self) -> None:
        args = self.args
        num_classes = len(self.val_loader.dataset.classes)
        self.say(f"=> creating {args.arch} for {num_classes} classes on {self.device}")
        self.module = models.create(args.arch, num_classes, args.pretrained)
        self.module.to(self.device, memory_format=self.memory_format)
        self.model: nn.Module = self.module
        if self.ranks.distributed:
            device_ids = [self.device] if self.on_gpu else None
            self.model = DistributedDataParallel(self.module, device_ids)
        self.optimizer = torch.optim.SGD(
            self.module.parameters(), args.lr, momentum=args.momentum, weight_decay=args.wd
        )
        scales_loss = self.amp_dtype is torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scales_loss)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.amp_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.amp_dtype)

    def run(self) -> None:
        """Train and validate from the present state through the last epoch."""
        with self.stop:
            while self.epoch < self.args.epochs:
                if not self.trained:
                    self._train_epoch()
                acc1 = self.validate()
                self.epoch, self.num_batches, self.trained = self.epoch + 1, 0, False
                self.counts = Counts(self.device)
                is_best = acc1 > self.best_acc1
                self.best_acc1 = max(acc1, self.best_acc1)
                self._save(is_best)

    def _train_epoch(self) -> None:
        """Train on what is left of the epoch."""
        args = self.args
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * 0.1 ** (self.epoch // args.lr_step)
        if self.num_batches == 0:  # else the loader goes on in the epoch of the state it has loaded
            self.train_loader.set_epoch(self.epoch)
        self.model.train()
        pace = Pace()
        for images, target in self.train_loader:
            pace.data_is_there()
            self._train_batch(images, target)
            self.num_batches += 1
            self.trained = self.num_batches == len(self.train_loader)
            pace.batch_is_done(len(target) * self.ranks.world_size)
            if self.trained or self.num_batches % args.print_freq == 0:
                self._report(pace)
            if args.save_freq and self.num_batches % args.save_freq == 0:
                self._save()
            self._stop_if_asked()
        self.say(f"Data:  {self.train_loader.progress_line()}")

    def _train_batch(self, images: Tensor, target: Tensor) -> None:
        with self._autocast():
            output = self.model(images)
            loss = F.cross_entropy(output, target)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.counts.add(loss.detach() * len(target), output.detach(), target)

    def _report(self, pace: Pace) -> None:
        place = f"[{self.epoch}][{self.num_batches:4}/{len(self.train_loader)}]"
        self.say(f"Epoch: {place}  {pace}  {self.counts.total()}")

    @torch.inference_mode()
    def validate(self) -> float:
        """Return top-1 accuracy in percent over every validation sample, each counted once."""
        self.module.eval()
        if self.ranks.distributed:
            # Each rank has running means of its own; rank 0's are those that are saved.
            for buffer in self.module.buffers():
                dist.broadcast(buffer, 0)
        counts = Counts(self.device)
        for images, target in self.val_loader:
            with self._autocast():
                output = self.module(images)
                loss_sum = F.cross_entropy(output, target, reduction="sum")
            counts.add(loss_sum, output, target)
            self._stop_if_asked()
        total = counts.total()
        hits = f"{total.correct1:.0f} and {total.correct5:.0f} of {total.num_samples:.0f}"
        accuracy = f"Acc@1 {total.acc1:.3f} Acc@5 {total.acc5:.3f}"
        self.say(f" *   {accuracy} ({hits} samples), Loss {total.mean_loss:.5f}")
        return total.acc1

    def _stop_if_asked(self) -> None:
        number = self.stop.agreed_signal()
        if number:
            self._save()
            checkpoint = self.args.output / CHECKPOINT
            self.say(f"=> stopped by {signal.Signals(number).name}; --resume {checkpoint} goes on")
            raise SystemExit(128 + number)  # as a shell reports it: the job hasn't ended by itself

    def _save(self, is_best: bool = False) -> None:
        """Write a checkpoint. Every rank must call; rank 0 writes."""
        in_mid_epoch = self.num_batches > 0 and not self.trained
        random_states = [_random_state(self.on_gpu)]
        if self.ranks.distributed:
            random_states *= self.ranks.world_size
            dist.all_gather_object(random_states, random_states[0])
        state = {
            "epoch": self.epoch,
            "num_batches": self.num_batches,
            "trained": self.trained,
            "counts": list(self.counts.total()),
            "best_acc1": self.best_acc1,
            "arch": self.args.arch,
            "state_dict": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random_states": random_states,
            "loader": self.train_loader.state_dict() if in_mid_epoch else None,
        }
        if self.ranks.rank == 0:
            self.args.output.mkdir(parents=True, exist_ok=True)
            path = self.args.output / CHECKPOINT
            unfinished = path.with_suffix(".unfinished")
            torch.save(state, unfinished)
            unfinished.replace(path)  # a kill while saving leaves the former checkpoint whole
            if is_best:
                shutil.copyfile(path, self.args.output / BEST_CHECKPOINT)

    def _resume(self) -> None:
        args = self.args
        state = torch.load(args.resume, map_location="cpu", weights_only=True)
        if state["arch"] != args.arch:
            raise SystemExit(f"{args.resume} holds a {state['arch']}: use -a {state['arch']}")
        self.module.load_state_dict(state["state_dict"])
        self.epoch, self.num_batches = state["epoch"], state["num_batches"]
        self.say(f"=> loaded {args.resume}: epoch {self.epoch}, batch {self.num_batches}")
        if args.evaluate:
            return
        self.trained, self.best_acc1 = state["trained"], state["best_acc1"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ranks.rank == 0:  # they are sums over all ranks
            self.counts.sums += torch.tensor(state["counts"], device=self.device)
        if len(state["random_states"]) == self.ranks.world_size:
            _set_random_state(state["random_states"][self.ranks.rank], self.on_gpu)
        if state["loader"] is not None:
            self.train_loader.load_state_dict(state["loader"])


class Pace:
    """Where the time of an epoch goes."""

    def __init__(self) -> None:
        self._begin = self._last = time.perf_counter()
        self._data_seconds = 0.0
        self._num_batches = 0
        self._num_images = 0

    def data_is_there(self) -> None:
        self._data_seconds += time.perf_counter() - self._last

    def batch_is_done(self, num_images: int) -> None:
        self._num_batches += 1
        self._num_images += num_images
        self._last = time.perf_counter()

    def __str__(self) -> str:
        seconds = time.perf_counter() - self._begin
        num_batches = max(self._num_batches, 1)
        return (
            f"Time {seconds / num_batches:.3f}  Data {self._data_seconds / num_batches:.3f}  "
            f"{self._num_images / seconds:.0f} images/s"
        )


def _random_state(on_gpu: bool) -> list[Tensor]:
    """The state of the generators that dropout and the like draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if on_gpu else [])]


def _set_random_state(states: list[Tensor], on_gpu: bool) -> None:
    torch.set_rng_state(states[0])
    if on_gpu and len(states) > 1:
        torch.cuda.set_rng_state(states[1])


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        training = Training(args, Ranks.from_environment())
        if args.evaluate:
            training.validate()
        else:
            training.run()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
