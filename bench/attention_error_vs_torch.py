#!/usr/bin/env python3
"""Rounding errors of attention in bf16 and f16 beside PyTorch's SDPA, on the same inputs and the same GPU.

usage: bench/attention_error_vs_torch.py --out FILE.json [--program build/cuda/flexchat] [--seeds 8]

flexchat writes the tensors of a causal attention; PyTorch computes the same in the same dtype, and both are held
against double precision. A ratio below 1 means that flexchat is closer. rms: over the tensors of all seeds, relative
to the tensors'; max_abs: the largest error of a seed, the mean over seeds, for a single one says little.
"""
import argparse, json, os, subprocess, tempfile
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

SHAPES = [(2, 4, 4, 512, 64), (2, 4, 4, 512, 128), (1, 8, 2, 1024, 128)]  # B, H, G, T, D
TENSORS = ["out", "dq", "dk", "dv"]


def ours(program, dtype, shape, seed):
    b, h, g, t, d = shape
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "case.safetensors")
        command = [program, "verify", "attention", "--device", "cuda", "--dtype", dtype, "--mask", "causal", "--batch", b,
                   "--n-head", h, "--n-kv-head", g, "--q-len", t, "--head-dim", d, "--seed", seed, "--save", file,
                   "--runs", folder, "--json"]
        subprocess.run([str(w) for w in command], check=True, capture_output=True)
        tensors = load_file(file)
    heads = dict(q=h, k=g, v=g, dout=h, out=h, dq=h, dk=g, dv=g)
    return {k: x.cuda().view(b, t, heads[k], d).transpose(1, 2) for k, x in tensors.items()}


def in_torch(x, dtype):
    q, k, v = [x[name].to(dtype).detach().requires_grad_() for name in "qkv"]
    group, t = q.shape[1] // k.shape[1], q.shape[2]
    if dtype == torch.float64:  # plain products in double
        s = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * q.shape[-1]**-0.5
        s = s.masked_fill(torch.ones(t, t, device="cuda").triu(1).bool(), float("-inf"))
        out = s.softmax(-1) @ v.repeat_interleave(group, 1)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=group > 1)
    out.backward(x["dout"].to(dtype))
    return dict(out=out.detach(), dq=q.grad, dk=k.grad, dv=v.grad)


class Errors:
    def __init__(self):
        self.squares, self.total, self.largest = 0.0, 0.0, []

    def add(self, got, want):
        e = (got.double() - want).abs()
        self.squares += e.pow(2).sum().item()
        self.total += want.pow(2).sum().item()
        self.largest.append(e.max().item())

    def summary(self):
        return dict(rms=(self.squares / self.total)**0.5, max_abs=sum(self.largest) / len(self.largest))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--program", default="build/cuda/flexchat")
    parser.add_argument("--seeds", type=int, default=8)
    args = parser.parse_args()
    rows = []
    for dtype, torch_dtype in [("bf16", torch.bfloat16), ("f16", torch.float16)]:
        for shape in SHAPES:
            mine, theirs = {n: Errors() for n in TENSORS}, {n: Errors() for n in TENSORS}
            for seed in range(1, args.seeds + 1):
                x = ours(args.program, dtype, shape, seed)
                want, peer = in_torch(x, torch.float64), in_torch(x, torch_dtype)
                for n in TENSORS:
                    mine[n].add(x[n], want[n])
                    theirs[n].add(peer[n], want[n])
            for n in TENSORS:
                a, p = mine[n].summary(), theirs[n].summary()
                b, h, g, t, d = shape
                row = dict(shape=f"B{b} H{h}/{g} T{t} D{d}", dtype=dtype, tensor=n, flexchat=a, torch=p,
                           rms_ratio=a["rms"] / p["rms"], max_ratio=a["max_abs"] / p["max_abs"])
                rows.append(row)
                print(f"{row['shape']:20s} {dtype:4s} {n:4s} rms {a['rms']:.3e} / {p['rms']:.3e} = {row['rms_ratio']:.3f}   "
                      f"max {a['max_abs']:.3e} / {p['max_abs']:.3e} = {row['max_ratio']:.3f}", flush=True)
    git = lambda *w: subprocess.run(["git", *w], capture_output=True, text=True).stdout.strip()
    json.dump(dict(command=f"bench/attention_error_vs_torch.py --seeds {args.seeds}", commit=git("rev-parse", "HEAD"),
                   dirty=bool(git("status", "--porcelain")), gpu=torch.cuda.get_device_name(), torch=torch.__version__,
                   rows=rows), open(args.out, "w"), indent=1)


if __name__ == "__main__":
    main()
