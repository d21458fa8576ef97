"""From three images to an aligned generator, in the steps of a notebook.

Every cell between two `# %%` can be run alone in an editor that knows them, or pasted into a
notebook. The generator is the small one in the package, the images are digits in a style that it
does not know; put in your own, such as "stabilityai/sdxl-turbo", which wants a GPU.

    python examples/quickstart.py [folder]
"""

# %% What the generator makes now
import sys
from pathlib import Path

from PIL import Image

import oneshot_fast as osf
from oneshot_fast.embedded.digits import write_default_dataset


def grid(rows):
    """Rows of pictures as one picture, four times as large."""
    w, h = rows[0][0].size
    sheet = Image.new("RGB", (w * max(map(len, rows)), h * len(rows)))
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            sheet.paste(picture, (w * c, h * r))
    return sheet.resize((4 * sheet.width, 4 * sheet.height), Image.Resampling.NEAREST)


def main(folder="runs/quickstart", steps=40, cycles=2, epochs=40, samples=50):
    """Return the losses of the assignment and the summary of the alignment."""
    folder = Path(folder)
    generator = osf.OneStepGenerator.from_pretrained("tiny", master_weights=True)

    # %% Three images and their prompts
    write_default_dataset(folder / "digits")
    data = list(osf.open_pairs(folder / "digits" / "train"))[:3]
    prompts = [record.prompt for record in data]
    images = [Image.open(record.image_path) for record in data]
    before = generator.generate(prompts, seed=1)

    # %% Assign: the Gaussian noise that the generator maps closest to each image
    found = osf.assign_noise(generator, prompts, images, osf.AssignOptions(steps=steps))
    print(f"noises {list(found.z.shape)}, mean loss {found.best_loss.mean():.4f}")
    closest = generator.generate(prompts, found.z)

    # %% Align: assign and train in turn; interrupt it as you like, it goes on where it stopped
    options = osf.EmOptions(
        num_cycles=cycles,
        assign_steps=steps,
        train_epochs=epochs,
        train_lr=1e-4,
        preserve_latent_weight=0,  # nothing of the old style is to stay
        preserve_pixel_weight=0,
    )
    summary = osf.EmRun(generator, data, folder / "em", options, eval_samples=samples).run()

    # %% The same fresh noises before and after; `generator` has been trained in place
    after = generator.generate(prompts, seed=1)
    grid([images, closest, before, after]).save(folder / "quickstart.png")
    print(f"targets, closest, fresh noise before and after: {folder / 'quickstart.png'}")
    print(f"for any diffusers code: {folder / 'em' / 'checkpoint-final'}")
    return found, summary


if __name__ == "__main__":
    main(*sys.argv[1:])
