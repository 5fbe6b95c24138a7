"""Which loaders of the host get a device, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Loader:
    """A class of the host or of a node pack that loads or uses a model, by the name that workflows use.

    `device` is what the input that chooses the device is called; `is_link` says that it comes from another node, and
    `gives` that the node gives it on. `offload` is the input that says where weights wait, if there is one. `own` is
    the pack's own input in its place, with what that takes for a GPU and for the CPU. `early` says that the inputs come
    before the optional ones, as in workflows that keep widgets by their order. `noted` is an input that is only
    noted in the dictionary that the node gives, for `swaps` to find it there.

    `virtual` says that there is a node with virtual VRAM as well; `compute` is what its device input is called.
    `legacy` says that there is one under its old name, too.
    """

    name: str
    device: str = "device"
    virtual: bool = True
    compute: str = "compute_device"
    eject: bool = True
    legacy: bool = False
    is_link: bool = False
    gives: bool = False
    offload: str = ""
    own: tuple[str, str, str] | None = None
    early: bool = False
    noted: str = ""
    swaps: bool = False


CORE = (
    Loader("UNETLoader"),
    Loader("VAELoader"),
    Loader("CLIPLoader", compute="device", eject=False),
    Loader("DualCLIPLoader", compute="device", eject=False),
    Loader("TripleCLIPLoader", compute="device", eject=False),
    Loader("QuadrupleCLIPLoader", compute="device", eject=False),
    Loader("CLIPVisionLoader"),
    Loader("CheckpointLoaderSimple"),
    Loader("ControlNetLoader"),
    Loader("DiffusersLoader"),
    Loader("DiffControlNetLoader"),
    Loader("StyleModelLoader", virtual=False),
    Loader("GLIGENLoader", virtual=False),
    Loader("unCLIPCheckpointLoader", virtual=False),
)

_LOADS_FIRST = ("load_device", "main_device", "offload_device")
_ENCODES = ("device", "gpu", "cpu")

# Those of packs: their models go where the host's functions say, or the names `device` and `offload_device` of the
# module that they are written in.
PACKS = (
    Loader("UnetLoaderGGUF", legacy=True),
    Loader("UnetLoaderGGUFAdvanced", legacy=True),
    Loader("CLIPLoaderGGUF", compute="device", eject=False, legacy=True),
    Loader("DualCLIPLoaderGGUF", compute="device", eject=False, legacy=True),
    Loader("TripleCLIPLoaderGGUF", compute="device", eject=False, legacy=True),
    Loader("QuadrupleCLIPLoaderGGUF", compute="device", eject=False, legacy=True),
    Loader("LTXVLoader", virtual=False),
    Loader("Florence2ModelLoader", virtual=False, offload="offload_device"),
    Loader("DownloadAndLoadFlorence2Model", virtual=False, offload="offload_device"),
    Loader("CheckpointLoaderNF4", virtual=False),
    Loader("LoadFluxControlNet", virtual=False),
    Loader("MMAudioModelLoader", virtual=False),
    Loader("MMAudioFeatureUtilsLoader", virtual=False),
    Loader("MMAudioSampler", virtual=False),
    Loader("PulidModelLoader", virtual=False),
    Loader("PulidInsightFaceLoader", virtual=False),
    Loader("PulidEvaClipLoader", virtual=False),
    Loader("HyVideoModelLoader", virtual=False),
    Loader("HyVideoVAELoader", virtual=False),
    Loader("DownloadAndLoadHyVideoTextEncoder", virtual=False),
    Loader("WanVideoModelLoader", virtual=False, device="compute_device", gives=True, early=True),
    Loader("WanVideoSampler", virtual=False, device="compute_device", is_link=True, swaps=True),
    Loader("LoadWanVideoT5TextEncoder", virtual=False, gives=True, own=_LOADS_FIRST),
    Loader("LoadWanVideoClipTextEncoder", virtual=False, gives=True, own=_LOADS_FIRST),
    Loader("WanVideoTextEncode", virtual=False, device="load_device", is_link=True, own=_ENCODES),
    Loader("WanVideoTextEncodeSingle", virtual=False, device="load_device", is_link=True, own=_ENCODES),
    Loader("WanVideoTextEncodeCached", virtual=False, device="load_device", own=_ENCODES),
    Loader("WanVideoClipVisionEncode", virtual=False, device="load_device", is_link=True),
    Loader("WanVideoImageToVideoEncode", virtual=False, device="load_device", is_link=True),
    Loader("WanVideoVACEEncode", virtual=False, device="load_device", is_link=True),
    Loader("WanVideoEncode", virtual=False, device="load_device", is_link=True),
    Loader("WanVideoDecode", virtual=False, device="load_device", is_link=True),
    Loader("WanVideoVAELoader", virtual=False, device="load_device", gives=True, early=True),
    Loader("WanVideoTinyVAELoader", virtual=False, device="load_device", gives=True, early=True),
    Loader("WanVideoBlockSwap", virtual=False, device="", noted="swap_device"),
    Loader("WanVideoControlnetLoader", virtual=False, early=True),
    Loader("FantasyTalkingModelLoader", virtual=False, early=True),
    Loader("Wav2VecModelLoader", virtual=False, early=True),
    Loader("WanVideoUni3C_ControlnetLoader", virtual=False, early=True),
    Loader("DownloadAndLoadWav2VecModel", virtual=False, early=True),
)
