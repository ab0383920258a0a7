"""Render the image set "products": about 690 pieces of furniture, from all around, a class each.

    python .github/render_products.py DIR       # DIR/<model>/<view>.jpg; ten minutes on one core

Needs pip install "vtk>=9.6" pillow numpy, libegl1, libgl1 and Debian's sweethome3d-furniture, which
apt-get gets into ~/.cache. Licences, CC-BY 3.0 and CC0, are in it. Do not commit the images.
"""

import argparse
import random
import subprocess
from multiprocessing.context import ForkProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import numpy as np
import vtk
from PIL import Image


def download_package():
    """The folder of Debian's package, downloaded and unpacked once."""
    cache = Path.home() / ".cache/sweethome3d-furniture"
    cache.mkdir(parents=True, exist_ok=True)
    get = "apt-get download sweethome3d-furniture && dpkg-deb -x *.deb new && mv new package"
    subprocess.run(f"test -d package || ({get})", shell=True, cwd=cache, check=True)
    return cache / "package"


def unpack_models(package, folder):
    """A list of .obj files, without the plainest and the slowest."""
    for name in ("BlendSwap-CC-0", "BlendSwap-CC-BY", "KatorLegaz", "Scopia"):
        ZipFile(package / f"usr/share/sweethome3d/furniture/{name}.sh3f").extractall(folder / name)
    return [obj for obj in sorted(folder.rglob("*.obj")) if 20e3 < obj.stat().st_size < 8e6]


def load_model(file, size):
    """A window of size x size px and its renderer, with the model in it."""
    window = vtk.vtkEGLRenderWindow(size=(size, size), multi_samples=4, alpha_bit_planes=1)
    renderer = vtk.vtkRenderer(background_alpha=0)
    window.AddRenderer(renderer)
    files = dict(file_name=file, file_name_mtl=file.with_suffix(".mtl"), texture_path=file.parent)
    vtk.vtkOBJImporter(render_window=window, **files).Update()
    for actor in renderer.GetActors():
        look = actor.property
        look.interpolation, look.ambient_color = vtk.VTK_PHONG, look.diffuse_color
        look.ambient, look.diffuse, look.specular, look.specular_power = 0.25, 0.75, 0.15, 20
        look.opacity = 1 if look.opacity < 0.25 else look.opacity
    return window, renderer


def set_camera_and_lights(renderer, turn, rng):
    """Look at the model from `turn` degrees of the way around it, in a light of its own."""
    low, high = np.reshape(renderer.ComputeVisiblePropBounds(), (3, 2)).T
    centre, tilt = (low + high) / 2, rng.uniform(5, 50)
    distance = np.linalg.norm(high - low) * rng.uniform(1.85, 2.4)
    camera = renderer.GetActiveCamera()
    camera.focal_point, camera.position = centre, centre + (0, 0, distance)
    camera.Azimuth(turn)
    camera.Elevation(tilt)
    over = [distance * rng.uniform(*ends) for ends in ((-1, 1), (1.8, 2.2), (-1, 1))]
    lamp = vtk.vtkLight(position=centre + over, focal_point=centre, intensity=rng.uniform(0.5, 0.8))
    flash = vtk.vtkLight(light_type=1, intensity=rng.uniform(0.25, 0.45))  # at the camera
    renderer.ResetCameraClippingRange()
    renderer.RemoveAllLights()
    renderer.AddLight(lamp)
    renderer.AddLight(flash)


def draw_ground(size, rng):
    """(size, size, 3): two colours in clouds of three sizes, or only one colour."""
    numbers = np.random.default_rng(rng.getrandbits(32))
    colour, other = numbers.integers(40, 256, (2, 3))
    grids = [Image.fromarray((numbers.random((n, n)) * 255).astype("uint8")) for n in (3, 12, 48)]
    clouds = np.mean([grid.resize((size, size), Image.BICUBIC) for grid in grids], axis=0) / 255
    return colour + (other - colour) * clouds[..., None] * (rng.random() >= 0.3)


def render_model(file, target, options):
    """Write the views of a model into the folder `target`, unless next to nothing is seen."""
    size, (window, renderer) = options.size, load_model(file, options.size)
    rng, images, covered = random.Random(target.name), file.parent / "images", []
    images.mkdir()
    for view in range(options.views):
        set_camera_and_lights(renderer, 360 * (view + 0.6 * rng.random()) / options.views, rng)
        window.Render()
        pixels = vtk.vtkUnsignedCharArray()
        window.GetRGBACharPixelData(0, 0, size - 1, size - 1, 0, pixels)
        pixels = np.reshape(pixels, (size, size, 4))[::-1]
        opacity = pixels[..., 3:] / 255
        image = pixels[..., :3] * opacity + draw_ground(size, rng) * (1 - opacity)
        Image.fromarray(image.astype("uint8")).save(images / f"{view:02d}.jpg", quality=92)
        covered.append((opacity > 0.5).mean())
    if np.median(covered) >= 0.02:
        images.rename(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dir", type=Path, help="another one for other --views or --size")
    parser.add_argument("--views", type=int, default=10)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--package", type=Path, help="where the package is unpacked")
    options = parser.parse_args()
    package, count = options.package or download_package(), 0
    options.dir.mkdir(parents=True, exist_ok=True)
    vtk.vtkObject.GlobalWarningDisplayOff()
    with TemporaryDirectory(dir=options.dir, prefix=".") as work:
        for file in unpack_models(package, Path(work)):
            target = options.dir / "__".join(file.relative_to(work).with_suffix("").parts)
            if not target.exists():
                child = ForkProcess(target=render_model, args=(file, target, options))
                child.start()  # a process of its own, for VTK crashes on a few files
                child.join()
                if child.exitcode and not count:
                    raise SystemExit("Cannot render. Are libegl1 and libgl1 installed?")
            count += target.exists()
            print(count, "models in", options.dir, end="\r", flush=True)
    print()
