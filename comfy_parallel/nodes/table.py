"""Which loaders of the host get a device, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Loader:
    """A loader class of the host or of a node pack, by the name that workflows use.

    `device` is what the input that chooses the device is called. `virtual` says that there is a node with virtual
    VRAM as well; `compute` is what its device input is called. `legacy` says that there is one under its old name, too.
    """

    name: str
    device: str = "device"
    virtual: bool = True
    compute: str = "compute_device"
    eject: bool = True
    legacy: bool = False


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

# The loaders of packs whose models go where the host's functions say. Packs with samplers of their own are not here.
PACKS = (
    Loader("UnetLoaderGGUF", legacy=True),
    Loader("UnetLoaderGGUFAdvanced", legacy=True),
    Loader("CLIPLoaderGGUF", compute="device", eject=False, legacy=True),
    Loader("DualCLIPLoaderGGUF", compute="device", eject=False, legacy=True),
    Loader("TripleCLIPLoaderGGUF", compute="device", eject=False, legacy=True),
    Loader("QuadrupleCLIPLoaderGGUF", compute="device", eject=False, legacy=True),
    Loader("LTXVLoader", virtual=False),
    Loader("Florence2ModelLoader", virtual=False),
    Loader("DownloadAndLoadFlorence2Model", virtual=False),
    Loader("CheckpointLoaderNF4", virtual=False),
    Loader("LoadFluxControlNet", virtual=False),
    Loader("MMAudioModelLoader", virtual=False),
    Loader("MMAudioFeatureUtilsLoader", virtual=False),
    Loader("PulidModelLoader", virtual=False),
    Loader("PulidInsightFaceLoader", virtual=False),
    Loader("PulidEvaClipLoader", virtual=False),
    Loader("HyVideoModelLoader", virtual=False),
    Loader("HyVideoVAELoader", virtual=False),
    Loader("DownloadAndLoadHyVideoTextEncoder", virtual=False),
)
