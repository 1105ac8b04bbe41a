"""Draw the card that a shared link shows, nbs/images/card.png (1200 x 630): `python .ci/card.py`.

Run it by hand when the title or the palette changes: fonts differ between machines, so CI does not redraw it.
"""
from pathlib import Path
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

ROOT = Path(__file__).resolve().parents[1]
INK, SOFT, FROZEN, TRAINED = '#1f2830', '#55616d', '#0069a6', '#e07b24'

def block(ax, x, y, w, h, color, name):
    "A matrix with its name under it; sizes in pixels of the card."
    ax.add_patch(Rectangle((x, y), w, h, color=color))
    ax.text(x + w / 2, y - 24, name, color=INK, fontsize=20, ha='center', va='top', family='monospace')

def card():
    "The figure: what the book says on the left, W beside B and A on the right."
    fig = plt.figure(figsize=(12, 6.3), dpi=100)
    ax = fig.add_axes([0, 0, 1, 1], xlim=(0, 1200), ylim=(0, 630))
    ax.axis('off')
    ax.text(70, 430, 'tiny_llm', color=INK, fontsize=58, weight='bold', family='monospace')
    ax.text(70, 330, 'A book about LoRA that runs', color=INK, fontsize=28)
    ax.text(70, 215, 'Fine-tune a small GPT with low-rank adapters\non your own computer, one notebook at a time.',
            color=SOFT, fontsize=18, linespacing=1.5)
    block(ax, 790, 160, 150, 330, FROZEN, 'W frozen')
    ax.text(970, 325, '+', color=INK, fontsize=34, ha='center', va='center')
    block(ax, 1005, 160, 20, 330, TRAINED, 'B')
    block(ax, 1045, 470, 110, 20, TRAINED, 'A')
    ax.text(1100, 345, 'trained', color='#b04a00', fontsize=20, ha='center', va='top', family='monospace')
    return fig

if __name__ == '__main__': card().savefig(ROOT / 'nbs/images/card.png', metadata={'Software': None})
