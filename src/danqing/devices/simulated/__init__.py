"""A simulated NPU: torch's `npu` device with host memory, CPU arithmetic, and a chip's refusals.

It proves that a program's path works on such a device: nothing is left on the CPU, no dtype is used
that the chip refuses, no operator that torch_npu lacks, no more memory than there is. It proves
neither the numerics nor the speed of hardware.

`install` must run before diffusers, transformers and accelerate are imported, which look once at
what is installed. A process has one such device, or the real one.
"""

from danqing.devices.simulated.install import install

__all__ = ["install"]
