"""Which images stand where: token ids, table of images and pixels are held against each other here alone.

An image is its image-start token and the slots right behind it. An image-start token without slots announces
an image that is still to be generated.
Letters: B rows, T tokens, N images a row, I images of all rows in row-major order, S slots an image.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_interleaved.tokens.visibility import NO_IMAGE


class ImageTokens(NamedTuple):
    """What an image is made of in token ids."""

    start: int
    slot: int
    num_slots: int


def placed_images(
    input_ids_BT: Tensor,
    image_start_BN: Tensor | None,
    images: Tensor | None,
    tokens: ImageTokens,
    name: str = "pixel_values",
) -> Tensor:
    """Where the images of ids stand, one of `images` for each: see `image_table`.

    Args:
        images: (I, ...), what is given of each image; None: nothing.
        name: what `images` are.

    Raises:
        ValueError: ids, table and images do not agree.
    """
    check_ids(input_ids_BT)
    # A single token is no image: tokens are generated without being searched.
    if input_ids_BT.shape[1] > 1 or image_start_BN is not None:
        found_BN = image_table(input_ids_BT, image_start_BN, tokens)
    else:
        found_BN = no_images(input_ids_BT)
    check_number(images, count_images(found_BN), "input_ids", name)
    return found_BN


def image_table(input_ids_BT: Tensor, image_start_BN: Tensor | None, tokens: ImageTokens) -> Tensor:
    """Index of each image's start token in its row, (B, N) int64, `NO_IMAGE` where there is none.

    Args:
        image_start_BN: what the caller says of it; None: read off the ids.

    Raises:
        ValueError: these are no ids, or the table does not say what they say.
    """
    check_ids(input_ids_BT)
    found_BN = find_images(input_ids_BT, tokens)
    if image_start_BN is None:
        return found_BN
    check_form(image_start_BN, "image_start", "images")
    image_start_BN = image_start_BN.to(input_ids_BT.device, torch.int64)
    _check_table(input_ids_BT, image_start_BN, found_BN, tokens)
    return image_start_BN


def count_images(image_start_BN: Tensor) -> int:
    """Images of a table."""
    if image_start_BN.shape[1] == 0:
        # Known without reading it, which compiled code could not.
        return 0
    return int((image_start_BN != NO_IMAGE).sum())


def shifted(image_start_BN: Tensor, by: int) -> Tensor:
    """The table of the same images, whose rows begin `by` tokens earlier."""
    return torch.where(image_start_BN == NO_IMAGE, NO_IMAGE, image_start_BN + by)


def no_images(tokens_BT: Tensor) -> Tensor:
    """The table of rows without images, (B, 0) int64; tokens may be ids or embeddings."""
    return torch.empty(len(tokens_BT), 0, dtype=torch.int64, device=tokens_BT.device)


def find_images(input_ids_BT: Tensor, tokens: ImageTokens) -> Tensor:
    """The table of images that ids hold, as `placed_images`.

    Raises:
        ValueError: an image has too few or too many slots.
    """
    is_slot_BT = input_ids_BT == tokens.slot
    is_start_BT = (input_ids_BT == tokens.start) & F.pad(is_slot_BT[:, 1:], (0, 1))
    _check_slots(is_start_BT, is_slot_BT, tokens.num_slots)
    count_B = is_start_BT.sum(1)
    num_images = int(count_B.max()) if len(count_B) else 0
    # Stable: the places of starts, in order, then all others.
    place_BN = torch.argsort((~is_start_BT).to(torch.int8), dim=1, stable=True)[:, :num_images]
    is_image_BN = torch.arange(num_images, device=place_BN.device) < count_B[:, None]
    return place_BN.masked_fill(~is_image_BN, NO_IMAGE)


def unread_images(
    image_start_BN: Tensor, pixel_values: Tensor | None, num_read: int, tokens: ImageTokens
) -> tuple[Tensor, Tensor | None]:
    """Of the images of ids whose first `num_read` tokens a cache has read, those that it has not.

    Args:
        image_start_BN: all images of the ids, see `image_table`.
        pixel_values: of all these images, or of the unread ones alone.

    Returns:
        their table, counted in the whole ids, and their pixels.

    Raises:
        ValueError: pixels of another number of images, or the cache ends inside an image.
    """
    is_image_BN, is_unread_BN = image_start_BN != NO_IMAGE, image_start_BN >= num_read
    if (is_image_BN & ~is_unread_BN & (image_start_BN + tokens.num_slots >= num_read)).any():
        raise ValueError(f"cache: its {num_read} tokens end inside an image, expected whole images")
    num_images, num_unread = int(is_image_BN.sum()), int(is_unread_BN.sum())
    if pixel_values is not None and len(pixel_values) == num_images != num_unread:
        pixel_values = pixel_values[is_unread_BN[is_image_BN]]
    check_number(pixel_values, num_unread, "input_ids" if num_read == 0 else "input_ids behind the cache")
    unread_BN = image_start_BN.masked_fill(~is_unread_BN, NO_IMAGE)
    return unread_BN[:, is_unread_BN.any(0)], pixel_values


def slot_places(image_start_BN: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """Row and position of each slot, image after image: (I * S,) each."""
    row_I, column_I = (image_start_BN != NO_IMAGE).nonzero(as_tuple=True)
    slot_S = torch.arange(1, num_slots + 1, device=image_start_BN.device)
    position_IS = image_start_BN[row_I, column_I][:, None] + slot_S
    return row_I[:, None].expand_as(position_IS).flatten(), position_IS.flatten()


def check_number(images: Tensor | None, num_images: int, place: str, name: str = "pixel_values") -> None:
    """There are as many images as `place` holds.

    Raises:
        ValueError: there are not.
    """
    found = 0 if images is None else len(images)
    if found != num_images:
        raise ValueError(f"{name}: found {found} images, expected the {num_images} that {place} hold")


def check_ids(input_ids_BT: Tensor) -> None:
    """Token ids are whole numbers, at least one of them in each of at least one row.

    Raises:
        ValueError: they are not.
    """
    check_form(input_ids_BT, "input_ids", "tokens")
    if input_ids_BT.numel() == 0:
        raise ValueError(f"input_ids: found no token in the shape {tuple(input_ids_BT.shape)}, expected some")


def check_form(numbers: Tensor, name: str, columns: str, num_rows: int | None = None) -> None:
    """A table of whole numbers.

    Args:
        columns: what stands side by side in a row.
        num_rows: how many rows there must be; None: any number.

    Raises:
        ValueError: it has another shape or type.
    """
    is_whole = not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)
    if numbers.ndim != 2 or not is_whole or num_rows not in (None, len(numbers)):
        rows = "rows" if num_rows is None else num_rows
        raise ValueError(
            f"{name}: expected whole numbers of shape ({rows}, {columns}), found "
            f"{str(numbers.dtype).removeprefix('torch.')} of shape {tuple(numbers.shape)}"
        )


def check_beside_embeddings(
    inputs_embeds_BTD: Tensor, input_ids_BT: Tensor | None, image_start_BN: Tensor, num_slots: int
) -> None:
    """Embeddings are those of the ids, where there are ids, and long enough for the images.

    Raises:
        ValueError: they are not.
    """
    rows, num_tokens = inputs_embeds_BTD.shape[:2]
    if input_ids_BT is not None and input_ids_BT.shape != (rows, num_tokens):
        raise ValueError(
            f"inputs_embeds: found embeddings of {rows} x {num_tokens} tokens, expected as many as input_ids "
            f"has, {' x '.join(map(str, input_ids_BT.shape))}"
        )
    check_form(image_start_BN, "image_start", "images", rows)
    last = int(image_start_BN.max()) + num_slots if image_start_BN.shape[1] else -1
    if last >= num_tokens:
        raise ValueError(
            f"image_start: an image ends at token {last}, expected it within the {num_tokens} tokens of "
            "inputs_embeds"
        )


def check_prompt(arguments: dict[str, Any]) -> None:
    """A batch of whole documents as the prompt of `generate`: what only losses need is taken out.

    Args:
        arguments: of `generate`, by name; changed in place.

    Raises:
        ValueError: a row packs several documents, or is padded on the right.
    """
    for name in ("text_target", "image_target", "target_pixel_values", "targets"):
        arguments.pop(name, None)
    document_start_BT, mask_BT = arguments.pop("document_start", None), arguments.get("attention_mask")
    if document_start_BT is not None:
        check_one_document(document_start_BT, mask_BT)
    if mask_BT is not None and mask_BT.ndim == 2 and not mask_BT[:, -1].all():
        row = int((mask_BT[:, -1] == 0).nonzero()[0])
        raise ValueError(
            f"attention_mask: row {row} is padded on the right, expected prompts padded on the left "
            "(padding_side='left')"
        )


def check_one_document(document_start_BT: Tensor, attention_mask_BT: Tensor | None) -> None:
    """Each row is one document, padding apart.

    Raises:
        ValueError: a row packs several.
    """
    largest_B, smallest_B = document_start_BT.amax(1), document_start_BT.amin(1)
    if attention_mask_BT is not None and attention_mask_BT.shape == document_start_BT.shape:
        is_token_BT, beyond = attention_mask_BT.bool(), document_start_BT.shape[1]
        largest_B = document_start_BT.masked_fill(~is_token_BT, 0).amax(1)
        smallest_B = document_start_BT.masked_fill(~is_token_BT, beyond).amin(1)
    if (largest_B > smallest_B).any():
        raise ValueError(
            "document_start: found several documents in a row, expected one where a cache is used"
        )


def check_pixels(pixel_values: Tensor) -> None:
    """Pixels are floating-point numbers of RGB images.

    Raises:
        ValueError: they are not.
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or not pixel_values.is_floating_point():
        raise ValueError(
            "pixel_values: expected floating-point RGB in [0, 1] of shape (images, 3, height, width), found "
            f"{str(pixel_values.dtype).removeprefix('torch.')} of shape {tuple(pixel_values.shape)}"
        )


def _check_slots(is_start_BT: Tensor, is_slot_BT: Tensor, num_slots: int) -> None:
    """Slots stand behind starts, as many as an image has, and nowhere else; also not beyond the end."""
    starts_until = F.pad(is_start_BT, (0, num_slots)).cumsum(1)
    width = starts_until.shape[1]
    starts_until = F.pad(starts_until, (num_slots + 1, 0))
    # A slot is expected where one of the tokens before it, at most as many as an image has slots, is a start.
    expected = starts_until[:, num_slots : num_slots + width] > starts_until[:, :width]
    wrong = (expected != F.pad(is_slot_BT, (0, num_slots))).nonzero()
    if len(wrong):
        row, token = wrong[0].tolist()
        lacks = bool(expected[row, token])
        raise ValueError(
            f"input_ids: row {row}, token {token}: found {'no' if lacks else 'a'} slot of an image, expected "
            f"{'one: ' if lacks else 'none: '}an image is its image-start token and {num_slots} slots"
        )


def _check_table(input_ids_BT: Tensor, given_BN: Tensor, found_BN: Tensor, tokens: ImageTokens) -> None:
    """A given table says what the ids say."""
    is_given, is_found = given_BN != NO_IMAGE, found_BN != NO_IMAGE
    if torch.equal(is_given.sum(1), is_found.sum(1)) and torch.equal(given_BN[is_given], found_BN[is_found]):
        return
    num_images, num_slots = int(is_given.sum()), int((input_ids_BT == tokens.slot).sum())
    raise ValueError(
        f"image_start: {num_images} images need {num_images * tokens.num_slots} slot tokens at the places of "
        f"image_start; input_ids hold {num_slots} slot tokens, of images that start at "
        f"{found_BN.tolist()}, image_start says {given_BN.tolist()}"
    )
