"""What contexts and batches of a CUDA backend share."""

from bitnet_numba.backends.cuda.forward import CudaModel
from bitnet_numba.backends.cuda.steps import DecodeBuffers
from bitnet_numba.kernels.runtime.device import CudaDevice
from bitnet_numba.kernels.runtime.driver import Stream
from bitnet_numba.kernels.runtime.memory import Uploads


class Runtime:
    """The model, and a stream for all work on it."""

    def __init__(self, device: CudaDevice, model: CudaModel, stream: Stream):
        self.device, self.model, self.stream = device, model, stream
        self.uploads = Uploads(stream)
        self.decode_buffers = DecodeBuffers(model)
