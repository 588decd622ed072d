"""What the kernel tests share: strategies, checks around a launch, the simulator, and compilation without a device.

The agreement with the kernel modules
- A kernel is a plain `@cuda.jit` function made by a cached factory `make_x(constants...)` (constants are closure
  variables, arguments are one-dimensional contiguous arrays and scalars). Block size is a factory argument or a module
  constant that a test may pass smaller, so that the simulator runs small blocks.
- Each module lists its compiled forms: `forms() -> list[kernels.forms.KernelForm]` (name, kernel, signature, threads,
  blocks_per_sm, dp4a, wide_loads). test_ptx.py compiles each for every architecture, with the launch bound
  (threads, blocks_per_sm), and checks the PTX: no local memory, at least so many dp4a and 16-byte loads, and, where
  ptxas is there, no spills and registers <= 65536 / (threads * blocks_per_sm).
- Simulator stand-ins in intrinsics.py find the running thread by `threading.current_thread()`. It has `threadIdx`,
  `blockIdx`, `syncthreads()`, and under this harness also `syncwarp()`: a barrier of the 32 threads of its warp alone,
  so that one warp may shuffle while the others wait at a block barrier. A stand-in for a shuffle therefore reads
      thread.<slot> = value; sync(); result = slot of the other lane; sync()
  with sync = getattr(thread, "syncwarp", thread.syncthreads).
- Kernels that wait for each other across blocks (a grid barrier) cannot run on the simulator with more than one
  block, because it runs block after block: such kernels take the number of blocks from gridDim and are simulated with one.
"""
