#!/usr/bin/env python3
"""How long NVRTC takes over the attention kernels, without a GPU: what a new expression costs before its first use.

usage: kernel_compile_time.py [--kernels src/backend/cuda/kernels] [--against DIR] [--arch sm_90a] [--rounds 5]
                              [--nvrtc libnvrtc.so.13] [--out FILE.json]

The mod is the example of mod_contract.cuh: the Synaptic GPT's score mod with gradients of two captured tensors, and a
prefix mask. Prints milliseconds of CPU time, medians; with --against those of the kernels in another folder too, compiled
in turn.
"""
import argparse, ctypes, glob, json, os, statistics, sys, time

DTYPES = {"f32": 0, "bf16": 1}


def headers_of(folder):
    headers = {os.path.basename(path): open(path).read() for path in glob.glob(os.path.join(folder, "*.cuh"))}
    if "mod_contract.cuh" not in headers:
        sys.exit(f"kernel_compile_time.py: {folder} holds no mod_contract.cuh")
    return headers


def compile_ms(nvrtc, headers, arch, dtype, head_dim, kernel):
    source = "\n".join([
        f"#define ATTENTION_DTYPE {DTYPES[dtype]}", f"#define ATTENTION_HEAD_DIM {head_dim}",
        "#define ATTENTION_PAGED 0", "#define ATTENTION_DROPOUT 0",
        '#include "mod_contract.cuh"', f'#include "attention_{kernel}.cuh"', ""])
    strings = lambda texts: (ctypes.c_char_p * len(texts))(*[text.encode() for text in texts])
    options = [f"--gpu-architecture={arch}", "-std=c++17", "-default-device"]
    start = time.process_time()
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"attention.cu", len(headers),
                             strings(list(headers.values())), strings(list(headers)))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), strings(options))
    ms = 1e3 * (time.process_time() - start)
    if failed:
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        sys.exit(f"kernel_compile_time.py: {kernel} {dtype} D{head_dim} does not compile:\n{log.value.decode()}")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return ms


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default=os.path.join(os.path.dirname(__file__), "../src/backend/cuda/kernels"))
    parser.add_argument("--against", help="a folder of other kernels")
    parser.add_argument("--arch", default="sm_90a")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nvrtc", default="libnvrtc.so.13", help="NVRTC's library")
    parser.add_argument("--out", help="a file for the same as JSON")
    args = parser.parse_args()
    try:
        nvrtc = ctypes.CDLL(args.nvrtc)
    except OSError as error:
        sys.exit(f"kernel_compile_time.py: --nvrtc: {error}")
    folders = {"ms": headers_of(args.kernels)}
    if args.against: folders["against_ms"] = headers_of(args.against)
    rows = []
    for kernel in ("forward", "backward", "decode"):
        for dtype in DTYPES:
            for head_dim in (64, 128):
                times = {name: [] for name in folders}
                for _ in range(args.rounds):
                    for name, headers in folders.items():
                        times[name].append(compile_ms(nvrtc, headers, args.arch, dtype, head_dim, kernel))
                row = {name: round(statistics.median(ms), 1) for name, ms in times.items()}
                rows.append({"kernel": kernel, "dtype": dtype, "head_dim": head_dim, **row})
                print(f"{kernel:9}{dtype:5} D{head_dim:<4}", *(f"{ms:7.0f}" for ms in row.values()), flush=True)
    if args.out:
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
        with open(args.out, "w") as out:
            json.dump({"command": " ".join(["python3"] + sys.argv), "arch": args.arch, "cpu": cpu,
                       "rounds": args.rounds, "rows": rows}, out, indent=1)


main()
