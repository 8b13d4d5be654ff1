"""The Cholesky factor of the inverse second moment that GPTQ passes errors on by."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_ATTEMPTS = 10
_LEAST_DAMPING = 1e-3  # of a second attempt


def damped_factor(
    moment: Float[Array, "k k"], damp: float
) -> tuple[Float[Array, "k k"], Float[Array, ""]]:
    """U, upper triangular, with U^T U = (H + damp I)^-1, where the mean of the diagonal of H is 1.

    While that is not positive definite in float32, `damp` grows tenfold.

    Args:
      moment: float32 [K, K]: H but for a factor, which GPTQ does not depend on. Inputs that were
        never seen, a zero on the diagonal, are taken for independent of all others.
      damp: not negative.

    Returns:
      U, and the damping it has, float32 []. After ten attempts, or if H is not finite, the identity
      and infinity, with which GPTQ is plain rounding.
    """
    diagonal = jnp.diagonal(moment)
    seen = diagonal > 0
    mean = jnp.sum(jnp.where(seen, diagonal, 0.0)) / jnp.maximum(
        jnp.sum(seen, dtype=jnp.float32), 1.0
    )
    unit = moment / jnp.where(mean > 0, mean, 1.0)
    identity = jnp.eye(moment.shape[0], dtype=jnp.float32)
    unit = jnp.where(seen & seen[:, None], unit, identity)

    def attempt(carry: tuple) -> tuple:
        _, before, attempts = carry
        more = jnp.maximum(before * 10, _LEAST_DAMPING)
        damping = jnp.where(attempts == 0, before, more)
        return _inverse_factor(unit + damping * identity), damping, attempts + 1

    def failed(carry: tuple) -> Array:
        factor, _, attempts = carry
        return ~jnp.all(jnp.isfinite(factor)) & (attempts < _ATTEMPTS)

    nothing = jnp.full_like(identity, jnp.nan), jnp.asarray(damp, jnp.float32), jnp.int32(0)
    factor, used, _ = jax.lax.while_loop(failed, attempt, nothing)
    good = jnp.all(jnp.isfinite(factor)) & jnp.all(jnp.isfinite(moment))
    return jnp.where(good, factor, identity), jnp.where(good, used, jnp.inf)


def _inverse_factor(moment: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """U, upper triangular, with U^T U = H^-1; NaN if H is not positive definite.

    With rows and columns reversed, the Cholesky factor of H is that of H = R R^T with R upper
    triangular; U is the inverse of R. So H itself is never inverted.
    """
    reversed_factor = jnp.linalg.cholesky(moment[::-1, ::-1])
    return jax.scipy.linalg.solve_triangular(
        reversed_factor[::-1, ::-1], jnp.eye(moment.shape[0], dtype=moment.dtype), lower=False
    )
