"""What the owners' numbers mean, label by label: one table per set of labels, from a mask to classes.

Names are the owners'; ADE20K's are the first of the owner's synonyms, in the SCLIP authors' spelling. `TABLES` has the
label of every number, for each dataset, in the order of its vocabulary in data/vocabularies.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from sclip_lab.metrics import IGNORE

VOC = {
    0: "background", 1: "aeroplane", 2: "bicycle", 3: "bird", 4: "boat", 5: "bottle", 6: "bus", 7: "car", 8: "cat",
    9: "chair", 10: "cow", 11: "diningtable", 12: "dog", 13: "horse", 14: "motorbike", 15: "person",
    16: "pottedplant", 17: "sheep", 18: "sofa", 19: "train", 20: "tvmonitor",
}  # fmt: skip

CONTEXT = {
    2: "aeroplane", 9: "bag", 18: "bed", 19: "bedclothes", 22: "bench", 23: "bicycle", 25: "bird", 31: "boat",
    33: "book", 34: "bottle", 44: "building", 45: "bus", 46: "cabinet", 59: "car", 65: "cat", 68: "ceiling",
    72: "chair", 80: "cloth", 85: "computer", 98: "cow", 104: "cup", 105: "curtain", 113: "dog", 115: "door",
    144: "fence", 158: "floor", 159: "flower", 162: "food", 187: "grass", 189: "ground", 207: "horse",
    220: "keyboard", 232: "light", 258: "motorbike", 259: "mountain", 260: "mouse", 284: "person", 295: "plate",
    296: "platform", 308: "pottedplant", 324: "road", 326: "rock", 347: "sheep", 349: "shelves", 354: "sidewalk",
    355: "sign", 360: "sky", 366: "snow", 368: "sofa", 397: "table", 415: "track", 416: "train", 420: "tree",
    424: "truck", 427: "tvmonitor", 440: "wall", 445: "water", 454: "window", 458: "wood",
}  # fmt: skip

COCO_THINGS = {
    0: "person", 1: "bicycle", 2: "car", 3: "motorcycle", 4: "airplane", 5: "bus", 6: "train", 7: "truck",
    8: "boat", 9: "traffic light", 10: "fire hydrant", 12: "stop sign", 13: "parking meter", 14: "bench",
    15: "bird", 16: "cat", 17: "dog", 18: "horse", 19: "sheep", 20: "cow", 21: "elephant", 22: "bear", 23: "zebra",
    24: "giraffe", 26: "backpack", 27: "umbrella", 30: "handbag", 31: "tie", 32: "suitcase", 33: "frisbee",
    34: "skis", 35: "snowboard", 36: "sports ball", 37: "kite", 38: "baseball bat", 39: "baseball glove",
    40: "skateboard", 41: "surfboard", 42: "tennis racket", 43: "bottle", 45: "wine glass", 46: "cup", 47: "fork",
    48: "knife", 49: "spoon", 50: "bowl", 51: "banana", 52: "apple", 53: "sandwich", 54: "orange", 55: "broccoli",
    56: "carrot", 57: "hot dog", 58: "pizza", 59: "donut", 60: "cake", 61: "chair", 62: "couch", 63: "potted plant",
    64: "bed", 66: "dining table", 69: "toilet", 71: "tv", 72: "laptop", 73: "mouse", 74: "remote", 75: "keyboard",
    76: "cell phone", 77: "microwave", 78: "oven", 79: "toaster", 80: "sink", 81: "refrigerator", 83: "book",
    84: "clock", 85: "vase", 86: "scissors", 87: "teddy bear", 88: "hair drier", 89: "toothbrush",
}  # fmt: skip

COCO_STUFF = {
    91: "banner", 92: "blanket", 93: "branch", 94: "bridge", 95: "building-other", 96: "bush", 97: "cabinet",
    98: "cage", 99: "cardboard", 100: "carpet", 101: "ceiling-other", 102: "ceiling-tile", 103: "cloth",
    104: "clothes", 105: "clouds", 106: "counter", 107: "cupboard", 108: "curtain", 109: "desk-stuff", 110: "dirt",
    111: "door-stuff", 112: "fence", 113: "floor-marble", 114: "floor-other", 115: "floor-stone", 116: "floor-tile",
    117: "floor-wood", 118: "flower", 119: "fog", 120: "food-other", 121: "fruit", 122: "furniture-other",
    123: "grass", 124: "gravel", 125: "ground-other", 126: "hill", 127: "house", 128: "leaves", 129: "light",
    130: "mat", 131: "metal", 132: "mirror-stuff", 133: "moss", 134: "mountain", 135: "mud", 136: "napkin",
    137: "net", 138: "paper", 139: "pavement", 140: "pillow", 141: "plant-other", 142: "plastic", 143: "platform",
    144: "playingfield", 145: "railing", 146: "railroad", 147: "river", 148: "road", 149: "rock", 150: "roof",
    151: "rug", 152: "salad", 153: "sand", 154: "sea", 155: "shelf", 156: "sky-other", 157: "skyscraper",
    158: "snow", 159: "solid-other", 160: "stairs", 161: "stone", 162: "straw", 163: "structural-other",
    164: "table", 165: "tent", 166: "textile-other", 167: "towel", 168: "tree", 169: "vegetable", 170: "wall-brick",
    171: "wall-concrete", 172: "wall-other", 173: "wall-panel", 174: "wall-stone", 175: "wall-tile",
    176: "wall-wood", 177: "water-other", 178: "waterdrops", 179: "window-blind", 180: "window-other", 181: "wood",
}  # fmt: skip

ADE20K = {
    1: "wall", 2: "building", 3: "sky", 4: "floor", 5: "tree", 6: "ceiling", 7: "road", 8: "bed", 9: "windowpane",
    10: "grass", 11: "cabinet", 12: "sidewalk", 13: "person", 14: "earth", 15: "door", 16: "table", 17: "mountain",
    18: "plant", 19: "curtain", 20: "chair", 21: "car", 22: "water", 23: "painting", 24: "sofa", 25: "shelf",
    26: "house", 27: "sea", 28: "mirror", 29: "rug", 30: "field", 31: "armchair", 32: "seat", 33: "fence",
    34: "desk", 35: "rock", 36: "wardrobe", 37: "lamp", 38: "bathtub", 39: "railing", 40: "cushion", 41: "base",
    42: "box", 43: "column", 44: "signboard", 45: "chestofdrawers", 46: "counter", 47: "sand", 48: "sink",
    49: "skyscraper", 50: "fireplace", 51: "refrigerator", 52: "grandstand", 53: "path", 54: "stairs", 55: "runway",
    56: "case", 57: "pooltable", 58: "pillow", 59: "screendoor", 60: "stairway", 61: "river", 62: "bridge",
    63: "bookcase", 64: "blind", 65: "coffeetable", 66: "toilet", 67: "flower", 68: "book", 69: "hill", 70: "bench",
    71: "countertop", 72: "stove", 73: "palm", 74: "kitchenisland", 75: "computer", 76: "swivelchair", 77: "boat",
    78: "bar", 79: "arcademachine", 80: "hovel", 81: "bus", 82: "towel", 83: "light", 84: "truck", 85: "tower",
    86: "chandelier", 87: "awning", 88: "streetlight", 89: "booth", 90: "televisionreceiver", 91: "airplane",
    92: "dirttrack", 93: "apparel", 94: "pole", 95: "land", 96: "bannister", 97: "escalator", 98: "ottoman",
    99: "bottle", 100: "buffet", 101: "poster", 102: "stage", 103: "van", 104: "ship", 105: "fountain",
    106: "conveyerbelt", 107: "canopy", 108: "washer", 109: "plaything", 110: "swimmingpool", 111: "stool",
    112: "barrel", 113: "basket", 114: "waterfall", 115: "tent", 116: "bag", 117: "minibike", 118: "cradle",
    119: "oven", 120: "ball", 121: "food", 122: "step", 123: "tank", 124: "tradename", 125: "microwave", 126: "pot",
    127: "animal", 128: "bicycle", 129: "lake", 130: "dishwasher", 131: "screen", 132: "blanket", 133: "sculpture",
    134: "hood", 135: "sconce", 136: "vase", 137: "trafficlight", 138: "tray", 139: "ashcan", 140: "fan",
    141: "pier", 142: "crtscreen", 143: "plate", 144: "monitor", 145: "bulletinboard", 146: "shower",
    147: "radiator", 148: "glass", 149: "clock", 150: "flag",
}  # fmt: skip

CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car",
    27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip

CITYSCAPES_VOID = {
    0: "unlabeled", 1: "ego vehicle", 2: "rectification border", 3: "out of roi", 4: "static", 5: "dynamic",
    6: "ground", 9: "parking", 10: "rail track", 14: "guard rail", 15: "bridge", 16: "tunnel", 18: "polegroup",
    29: "caravan", 30: "trailer",
}  # fmt: skip


def _labels(numbers: Iterable[int], first: int = 0) -> dict[int, int]:
    return {number: label for label, number in enumerate(numbers, first)}


COCO = COCO_THINGS | COCO_STUFF  # as in the pixel maps of COCO-Stuff 164k: COCO's category ids less 1
CONTEXT_ALL = range(460)  # PASCAL-Context has 459 labels; evaluated are the 59 that are frequent enough

TABLES: dict[str, dict[int, int]] = {
    "voc21": _labels(VOC) | {255: IGNORE},
    "voc20": _labels(list(VOC)[1:]) | {0: IGNORE, 255: IGNORE},
    "context60": dict.fromkeys(CONTEXT_ALL, 0) | _labels(CONTEXT, first=1),
    "context59": dict.fromkeys(CONTEXT_ALL, IGNORE) | _labels(CONTEXT),
    # The authors' conversion (GroupViT's before) makes stuff, and what nobody labelled (255), background.
    "coco-object": dict.fromkeys([*COCO_STUFF, 255], 0) | _labels(COCO_THINGS, first=1),
    "coco-stuff": _labels(COCO) | {255: IGNORE},
    # The 10k maps hold COCO's category ids themselves, with 0 where nobody labelled.
    "coco-stuff-10k": _labels(number + 1 for number in COCO) | {0: IGNORE},
    "ade20k": _labels(ADE20K) | {0: IGNORE},
    "cityscapes": _labels(CITYSCAPES) | dict.fromkeys(CITYSCAPES_VOID, IGNORE),
}


def remap(mask: np.ndarray, table: Mapping[int, int]) -> np.ndarray:
    """An owner's numbers [H W] -> labels [H W] uint8. Raises ValueError for numbers that `table` doesn't have."""
    place = np.full(max(table) + 2, -1, dtype=np.int16)  # the last one is for numbers beyond the table
    place[list(table)] = list(table.values())
    numbers = mask.astype(np.int32)
    labels = place[np.clip(numbers, -1, len(place) - 1)]
    if unknown := np.unique(numbers[labels < 0]).tolist():
        shown = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise ValueError(f"unknown numbers {shown}: expected {_ranges(table)}")
    return labels.astype(np.uint8)


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 255] -> "0-2, 255"."""
    ordered = sorted(numbers)
    starts = [number for number in ordered if number - 1 not in ordered]
    ends = [number for number in ordered if number + 1 not in ordered]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
