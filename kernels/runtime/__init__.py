"""How a kernel gets onto a device.

spec            what a kernel is specialised to: KernelSpec, ArchSpec
compiler        Numba's PTX, and machine code from it
disk_cache      where machine code is kept, and what it depends on
driver          calls into the CUDA driver; streams, graphs, events
memory          arrays on the device and in page-locked host memory
tensor_map      what the TMA needs to know of a matrix
launch          loading kernels, launches with prepared arguments
device          what launchers are given: a GPU, or a dry run
"""
