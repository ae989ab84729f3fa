"""``python -m nudge.kernels``: which library is installed, and whether each GPU can run it."""

import torch

from nudge.kernels import native
from nudge.kernels.machine import cpu_products, instruction_sets, processor


def main() -> None:
    library, problem = native.find(), native.load()
    print(f"torch      {torch.__version__}")
    print(f"library    {library or 'none'}")
    if problem is not None:
        print(f"           {problem}")
    elif library is not None:
        for name, value in native.stamp(library).items():
            print(f"{name:<10} {value[:60]}")
    for device in range(max(torch.cuda.device_count(), 1)):
        print(f"cuda:{device}     {native.why_not(device) or 'can run the kernel'}")
    print("cpu        can run the loss, by torch operations in chunks; needs no library")
    print(f"           {processor()}: {', '.join(instruction_sets())}")
    print(f"           products by {cpu_products()}")


if __name__ == "__main__":
    main()
