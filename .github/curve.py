"""The README's picture of accuracy against cost, from tables that evaluate.py wrote.

    python .github/curve.py TABLE.json [TABLE.json ...] .github/curve.png
"""
import json
import sys

import torch
from PIL import Image, ImageDraw, ImageFont


def draw_curve(path, rows):
    """Write a PNG of R@K (the first K) against the GFLOPs of a query, on a logarithmic axis, a dot a row of `trade_off`."""
    metric = next(key for key in rows[0] if key.startswith("R@"))
    width, height, left, bottom = 1000, 620, 90, 70         # px
    flops = torch.tensor([row["GFLOPs/query"] for row in rows]).log()
    low, span = flops.min() - 0.2, flops.max() - flops.min() + 1.4
    place = lambda x, y: (left + float((x - low) / span) * (width - left), (height - bottom) * (1.05 - y / 100 * 1.05) + 8)
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default
    for percent in range(0, 101, 20):
        draw.line([place(low, percent), (width, place(low, percent)[1])], "#dddddd")
        draw.text((left - 12, place(low, percent)[1]), str(percent), "black", font(22), anchor="rm")
    draw.text((left, 12), f"{metric} (%)", "black", font(22))
    draw.text((width - 12, height - 8), "GFLOPs per query", "black", font(22), anchor="rs")
    for x in sorted({row["GFLOPs/query"] for row in rows}):
        draw.text((place(torch.tensor(x).log(), 0)[0], height - bottom + 24), f"{x:.3g}", "black", font(20), anchor="mt")
    names = {name: colour for name, colour in zip(dict.fromkeys(row[""] for row in rows),
                                                  ("black", "#d73027", "#7570b3", "#1a9850", "#66bd63"))}
    for row, x in zip(rows, flops):
        x, y = place(x, row[metric])
        draw.ellipse((x - 7, y - 7, x + 7, y + 7), names[row[""]])
        draw.text((x + 12, y), f"{row['']}, {row['query px']} px", names[row[""]], font(18), anchor="lm")
    sheet.save(path)


if __name__ == "__main__":
    *tables, picture = sys.argv[1:]
    rows = [row for table in tables for row in json.load(open(table))]
    draw_curve(picture, [row for i, row in enumerate(rows) if row not in rows[:i]])
