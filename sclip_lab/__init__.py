"""sclip-lab: what must change in CLIP's last self-attention for its patch features to know where things are?"""

from sclip_lab.attention import attention, canonical, variant, variants
from sclip_lab.trunk import Readout, Site, Trunk, dense, encode
