"""Text in the sequence: linear mechanisms keep everything that involves it exact (EDiT's rule, arXiv 2503.16726)."""

from torch import Tensor

from ..call import AttnCall


def mix_text(call: AttnCall, image: Tensor) -> Tensor:
    """The whole sequence `[B, S, H, D]` from the linear attention `image` `[B, N, H, D]` among image tokens.

    Text queries attend to everything by softmax. Image queries mix `image` and softmax attention over the text keys,
    weighted by how many tokens each stands for: N / (N + T) and T / (N + T), T counting real text tokens only.
    """
    if call.text == 0:
        return image
    q, k = call.rotated()
    (tq, iq), (tk, _), (tv, _) = call.split(q), call.split(k), call.split(call.v)
    text_keys = all_keys = None
    count: float | Tensor = float(call.text)
    if call.text_mask is not None:
        text_keys = call.text_mask[:, None, None]
        real = call.text_mask.new_ones(image.shape[:2])
        all_keys = call.join(call.text_mask, real)[:, None, None]
        count = call.text_mask.sum(dim=1).to(image.dtype)[:, None, None, None]
    text = call.exact(tq, k, call.v, mask=all_keys)
    from_text = call.exact(iq, tk, tv, mask=text_keys)
    share = image.shape[1] / (image.shape[1] + count)
    return call.join(text, share * image + (1 - share) * from_text)
