"""Joins two folders of images side by side, before on the left and after on the right, for the spatial mode.

    python examples/influxedit/combine_images.py --dir_a before --dir_b after --output_dir combined

combined/NAME.png is the left image beside the right one of the same name (without the ending), which must have its
shape and is resized to it. The captions NAME.txt of --dir_b, or else of --dir_a, go with it, after --prefix. Train on
the folder with `--instance_data_dir combined --use_split_mask --mask_only_right`.
"""

import sys
from pathlib import Path

from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).parents[2]))

from common.arguments import Parser, check_folder
from common.data import (
    check_roles,
    file_example,
    find_partners,
    first_ten,
    image_files,
    read_sizes,
    read_text,
    same_shape,
)

from examples.influxedit.prepare_fill_circles import combine, write


def find_pairs(dir_a, dir_b):
    """({left image: right image}, problems) of two folders, whose images of one name must have one shape."""
    problems = [f"{folder}: no such folder" for folder in (dir_a, dir_b) if not folder.is_dir()]
    problems += check_roles({"--dir_a": dir_a, "--dir_b": dir_b})
    if problems:
        return {}, problems
    lefts, problems = image_files(dir_a)
    pairs, unmatched = find_partners(lefts, dir_b, "stem")
    problems += unmatched
    if not lefts and not problems:
        problems.append(f"{dir_a}: no images in it")
    sizes, unreadable = read_sizes([file_example(path) for path in (*pairs.keys(), *pairs.values())])
    problems += unreadable
    misfits = []
    for (left, right), size, right_size in zip(pairs.items(), sizes, sizes[len(pairs) :], strict=False):
        if size and right_size and not same_shape(right_size, size):
            misfits.append(f"{right}: is {right_size} pixels, {left} {size}: the two must have the same shape")
    return pairs, problems + first_ten(misfits)


def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir_a", type=Path, required=True, help="folder of the left images, and perhaps captions")
    parser.add_argument(
        "--dir_b", type=Path, required=True, help="folder of the right images, named like the left ones"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder for the joined images")
    parser.add_argument("--prefix", default="", help="text before the captions, such as: before and after, ")
    args = parser.parse_args(argv)
    pairs, problems = find_pairs(args.dir_a, args.dir_b)
    if args.output_dir.is_dir() and any(args.output_dir.iterdir()):
        problems.append(f"--output_dir {args.output_dir} exists and is not empty: name a new folder")
    captions = {}
    try:
        for left, right in pairs.items():
            captions[left] = read_text(right.with_suffix(".txt")) or read_text(left.with_suffix(".txt"))
    except ValueError as error:
        problems.append(str(error))
    parser.refuse(problems + check_folder("--output_dir", args.output_dir))

    args.output_dir.mkdir(parents=True, exist_ok=True)
    for left, right in tqdm(pairs.items(), desc="Joining", unit="pair"):
        combined = combine(file_example(left).image(), file_example(right).image())
        target = args.output_dir / f"{left.stem}.png"
        write(target, lambda path, combined=combined: combined.save(path, "PNG"))
        if captions[left]:
            text = args.prefix + captions[left]
            write(target.with_suffix(".txt"), lambda path, text=text: path.write_text(text, "utf-8"))
    print(f"{len(pairs)} pairs in {args.output_dir}")


if __name__ == "__main__":
    main()
