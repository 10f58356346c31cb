"""Paint the pictures of the README with danqing itself: `python docs/gallery.py`.

Each is written with its record, so `danqing generate --from docs/pictures/NAME.png` makes it again.
"""

from __future__ import annotations

from pathlib import Path

PICTURES = Path(__file__).parent / "pictures"
SCALE = 2
COLUMNS = 4
GAP = 8
GALLERY = {
    "red-sun": ("three blue mountains under a red sun, a boat on the water", 7),
    "night": (
        "two purple mountains at night, a white moon on the left, a boat with a white sail",
        2,
    ),
    "winter": ("four grey mountains in winter under a golden sun", 5),
    "spring": ("two green mountains in spring, a cherry tree on the left, a pavilion, a lake", 9),
    "dusk": ("a golden mountain at dusk, a flock of birds, two boats on the lake", 2),
    "mist": ("three green mountains with mist, a red sun, a pine on the right", 7),
    "shanshui": ("秋天，两座红山，一轮金色太阳，水上一只船，一棵枫树", 7),  # noqa: RUF001
    "shapes": ("a red circle above a blue square on a white ground", 11),
}
"""Prompt and seed of each picture."""


def main() -> None:
    """Paint all of them, and the sheet they are shown on, twice as large."""
    from PIL import Image

    import danqing

    PICTURES.mkdir(exist_ok=True)
    images = []
    with danqing.open("pocket", device="cpu") as engine:
        for name, (prompt, seed) in GALLERY.items():
            generation = engine.generate(prompt, seed=seed)
            generation.save(PICTURES / f"{name}.png", overwrite=True)
            images.append(generation.image)
    width, height = (SCALE * side for side in images[0].size)
    rows = (len(images) + COLUMNS - 1) // COLUMNS
    sheet = Image.new("RGB", (COLUMNS * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, COLUMNS)
        large = image.resize((width, height), Image.Resampling.BICUBIC)
        sheet.paste(large, (column * (width + GAP), row * (height + GAP)))
    sheet.save(PICTURES / "gallery.png", optimize=True)


if __name__ == "__main__":
    main()
