#!/usr/bin/env python3
"""Rounding errors of attention in bf16 and f16 beside PyTorch's SDPA, on the same inputs and the same GPU.

usage: bench/attention_error_vs_torch.py --out FILE.json [--program build/cuda/flexchat]

flexchat writes the tensors of a causal attention; PyTorch computes the same in the same dtype, and both are held
against double precision. A ratio below 1 means that flexchat is closer.
"""
import argparse, json, os, subprocess, tempfile
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

SHAPES = [(2, 4, 4, 512, 64), (2, 4, 4, 512, 128), (1, 8, 2, 1024, 128)]  # B, H, G, T, D


def errors(got, want):
    d = (got.double() - want).abs()
    return dict(max_abs=d.max().item(), rms=(d.pow(2).mean().sqrt() / want.pow(2).mean().sqrt()).item())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--program", default="build/cuda/flexchat")
    args = parser.parse_args()
    rows = []
    for dtype, torch_dtype in [("bf16", torch.bfloat16), ("f16", torch.float16)]:
        for b, h, g, t, d in SHAPES:
            with tempfile.TemporaryDirectory() as folder:
                file = os.path.join(folder, "case.safetensors")
                command = [args.program, "verify", "attention", "--device", "cuda", "--dtype", dtype, "--mask", "causal",
                           "--batch", b, "--n-head", h, "--n-kv-head", g, "--q-len", t, "--head-dim", d, "--save", file,
                           "--runs", folder, "--json"]
                subprocess.run([str(w) for w in command], check=True, capture_output=True)
                x = {k: v.cuda() for k, v in load_file(file).items()}
            heads = lambda a, n: a.view(b, t, n, d).transpose(1, 2)
            q, k, v = heads(x["q"], h), heads(x["k"], g), heads(x["v"], g)
            dout = heads(x["dout"], h)

            def grads(dtype_):
                qq, kk, vv = [a.to(dtype_).detach().requires_grad_() for a in (q, k, v)]
                if dtype_ == torch.float64:  # plain loops in double
                    s = qq @ kk.repeat_interleave(h // g, 1).transpose(-1, -2) * d**-0.5
                    s = s.masked_fill(torch.ones(t, t, device="cuda").triu(1).bool(), float("-inf"))
                    out = s.softmax(-1) @ vv.repeat_interleave(h // g, 1)
                else:
                    out = F.scaled_dot_product_attention(qq, kk, vv, is_causal=True, enable_gqa=g != h)
                out.backward(dout.to(dtype_))
                return dict(out=out.detach(), dq=qq.grad, dk=kk.grad, dv=vv.grad)
            want, peer = grads(torch.float64), grads(torch_dtype)
            for name, n in [("out", h), ("dq", h), ("dk", g), ("dv", g)]:
                mine, theirs = errors(heads(x[name], n), want[name]), errors(peer[name], want[name])
                row = dict(shape=f"B{b} H{h}/{g} T{t} D{d}", dtype=dtype, tensor=name, flexchat=mine, torch=theirs,
                           rms_ratio=mine["rms"] / theirs["rms"], max_ratio=mine["max_abs"] / theirs["max_abs"])
                rows.append(row)
                print(f"{row['shape']:20s} {dtype} {name:4s} rms {mine['rms']:.3e} / {theirs['rms']:.3e} = {row['rms_ratio']:.3f}   "
                      f"max {mine['max_abs']:.3e} / {theirs['max_abs']:.3e} = {row['max_ratio']:.3f}", flush=True)
    git = lambda *w: subprocess.run(["git", *w], capture_output=True, text=True).stdout.strip()
    json.dump(dict(command="bench/attention_error_vs_torch.py", commit=git("rev-parse", "HEAD"),
                   dirty=bool(git("status", "--porcelain")), gpu=torch.cuda.get_device_name(), torch=torch.__version__,
                   rows=rows), open(args.out, "w"), indent=1)


if __name__ == "__main__":
    main()
