// The numeric core of OFT for one block: packed v -> D = R - I, and dL/dD -> dL/dv (algorithms.md
// 1.3, 1.4). The order of operations is part of the contract: every output element of a product is
// a sum over ascending k of separately rounded products (no fma), so every instruction set and
// every device that follows the same order derives the same bits.
//
// Templated on the scalar so that tests run the same lines in float64. All functions have internal
// linkage: the kernels include this file once per instruction set, and copies must not be merged.
#pragma once

#include <cstdint>

namespace orbit {

// How a block turns the skew Q into R = I + D. Series: D = sum_k c_k Q^k, c_k = 2 below `degree`
// and c_degree = `last`. Exact: R = (I + Q)(I - Q)^-1.
struct OftTransform {
    bool exact = false;
    int32_t degree = 4;
    float last = 1.0f;
};

// PEFT's num_cayley_neumann_terms as a series. `old_rule`: PEFT before 0.18 gave the last power the
// coefficient 2 as well.
inline OftTransform neumann_transform(int32_t terms, bool old_rule) {
    if (terms <= 1) {
        return {.exact = false, .degree = 0, .last = 0.0f};
    }
    if (old_rule || terms == 2) {
        return {.exact = false, .degree = terms - 1, .last = 2.0f};
    }
    return {.exact = false, .degree = terms < 5 ? 3 : terms - 1, .last = 1.0f};
}

inline constexpr int64_t oft_parameters(int64_t b) {
    return b * (b - 1) / 2;
}

// Elements of scratch that the functions below need.
inline constexpr int64_t oft_workspace(int64_t b, const OftTransform& t) {
    return (t.degree + 8) * b * b;
}

// A vector of the width of the instruction set that this file is compiled for; the width decides
// how many columns go together, never what a column's sum is.
#if defined(__AVX512F__)
constexpr int64_t kOftVectorBytes = 64;
#elif defined(__AVX__)
constexpr int64_t kOftVectorBytes = 32;
#else
constexpr int64_t kOftVectorBytes = 16;
#endif

// Columns [j, j + lanes) of rows [i, i + kRows) of c = a b, all n x n.
template <typename S, int kRows>
static inline void oft_product_tile(const S* a, const S* b, S* c, int64_t n, int64_t i, int64_t j) {
    typedef S Vector __attribute__((vector_size(kOftVectorBytes)));
    Vector sum[kRows] = {};
    for (int64_t k = 0; k < n; ++k) {
        Vector row;
        __builtin_memcpy(&row, b + k * n + j, sizeof(row));
        for (int r = 0; r < kRows; ++r) {
            sum[r] = sum[r] + a[(i + r) * n + k] * row;
        }
    }
    for (int r = 0; r < kRows; ++r) {
        __builtin_memcpy(c + (i + r) * n + j, &sum[r], sizeof(sum[r]));
    }
}

// c = a b, all n x n row-major; c is neither a nor b.
template <typename S>
static void oft_product(const S* a, const S* b, S* c, int64_t n) {
    constexpr int64_t kLanes = kOftVectorBytes / static_cast<int64_t>(sizeof(S));
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        int64_t i = 0;
        for (; i + 4 <= n; i += 4) {
            oft_product_tile<S, 4>(a, b, c, n, i, j);
        }
        for (; i < n; ++i) {
            oft_product_tile<S, 1>(a, b, c, n, i, j);
        }
    }
    for (; j < n; ++j) {
        for (int64_t i = 0; i < n; ++i) {
            S sum = 0;
            for (int64_t k = 0; k < n; ++k) {
                sum = sum + a[i * n + k] * b[k * n + j];
            }
            c[i * n + j] = sum;
        }
    }
}

// The skew matrix of a packed row-major strict upper triangle. The lower half is 0 - v, so that
// v = 0 gives no negative zeros.
template <typename S>
static void oft_unpack(const S* v, int64_t b, S* q) {
    int64_t at = 0;
    for (int64_t i = 0; i < b; ++i) {
        q[i * b + i] = 0;
        for (int64_t j = i + 1; j < b; ++j) {
            const S value = v[at++];
            q[i * b + j] = value;
            q[j * b + i] = S(0) - value;
        }
    }
}

// d = 2 (I - Q)^-1 Q by Gaussian elimination without pivoting: I - Q has the identity as its
// symmetric part, so no pivot vanishes. Uses `lu`, [b, b].
template <typename S>
static void oft_exact_delta(const S* q, int64_t b, S* d, S* lu) {
    for (int64_t i = 0; i < b * b; ++i) {
        lu[i] = S(0) - q[i];
        d[i] = S(2) * q[i];
    }
    for (int64_t i = 0; i < b; ++i) {
        lu[i * b + i] = 1;
    }
    for (int64_t k = 0; k < b; ++k) {
        for (int64_t i = k + 1; i < b; ++i) {
            const S factor = lu[i * b + k] / lu[k * b + k];
            for (int64_t j = k + 1; j < b; ++j) {
                lu[i * b + j] -= factor * lu[k * b + j];
            }
            for (int64_t j = 0; j < b; ++j) {
                d[i * b + j] -= factor * d[k * b + j];
            }
        }
    }
    for (int64_t i = b - 1; i >= 0; --i) {
        for (int64_t k = i + 1; k < b; ++k) {
            const S factor = lu[i * b + k];
            for (int64_t j = 0; j < b; ++j) {
                d[i * b + j] -= factor * d[k * b + j];
            }
        }
        const S pivot = lu[i * b + i];
        for (int64_t j = 0; j < b; ++j) {
            d[i * b + j] /= pivot;
        }
    }
}

template <typename S>
static void oft_series_delta(const S* q, int64_t b, const OftTransform& t, S* d, S* work) {
    const int64_t size = b * b;
    const S last = static_cast<S>(t.last);
    if (t.degree == 4 && t.last == 1.0f) {
        S* s = work;
        S* p = work + size;
        oft_product(q, q, s, b);
        for (int64_t i = 0; i < size; ++i) {
            p[i] = S(2) * q[i] + s[i];
        }
        oft_product(s, p, d, b);
        for (int64_t i = 0; i < size; ++i) {
            d[i] = (S(2) * q[i] + S(2) * s[i]) + d[i];
        }
        return;
    }
    if (t.degree <= 1) {
        for (int64_t i = 0; i < size; ++i) {
            d[i] = t.degree == 0 ? S(0) : last * q[i];
        }
        return;
    }
    // Horner: h = 2 I + last Q, then h <- 2 I + Q h, and D = Q h.
    S* h = work;
    for (int64_t i = 0; i < size; ++i) {
        h[i] = last * q[i];
    }
    for (int32_t j = t.degree - 1; j >= 1; --j) {
        for (int64_t i = 0; i < b; ++i) {
            h[i * b + i] += S(2);
        }
        oft_product(q, h, d, b);
        for (int64_t i = 0; i < size; ++i) {
            h[i] = d[i];
        }
    }
}

// d: [b, b], row i column j. v: [b (b - 1) / 2].
template <typename S>
static void oft_rotation_delta(const S* v, int64_t b, const OftTransform& t, S* d, S* work) {
    S* q = work;
    oft_unpack(v, b, q);
    if (t.exact) {
        oft_exact_delta(q, b, d, work + b * b);
    } else {
        oft_series_delta(q, b, t, d, work + b * b);
    }
}

// dL/dQ of D = 2Q + 2S + S (2Q + S), S = Q Q (1.4); S is exactly symmetric, P^T = S - 2Q.
template <typename S>
static void oft_series4_gradient(const S* q, const S* g, int64_t b, S* gq, S* work) {
    const int64_t size = b * b;
    S* s = work;
    S* pt = work + size;
    S* gp = work + 2 * size;
    S* gs = work + 3 * size;
    S* product = work + 4 * size;
    oft_product(q, q, s, b);
    for (int64_t i = 0; i < size; ++i) {
        pt[i] = s[i] - S(2) * q[i];
    }
    oft_product(s, g, gp, b);
    oft_product(g, pt, gs, b);
    for (int64_t i = 0; i < size; ++i) {
        gs[i] = S(2) * g[i] + gs[i] + gp[i];
    }
    oft_product(gs, q, gq, b);
    oft_product(q, gs, product, b);
    for (int64_t i = 0; i < size; ++i) {
        gq[i] = (S(2) * g[i] + S(2) * gp[i]) - (gq[i] + product[i]);
    }
}

// dL/dQ of any series by reverse Horner, with H_j^T = c_j I - Q H_(j+1)^T.
template <typename S>
static void oft_series_gradient(
    const S* q, const S* g, int64_t b, const OftTransform& t, S* gq, S* work
) {
    const int64_t size = b * b;
    const S last = static_cast<S>(t.last);
    S* gj = work;
    S* product = work + size;
    S* ht = work + 2 * size;  // H_1^T .. H_degree^T
    for (int64_t i = 0; i < size; ++i) {
        gq[i] = 0;
        gj[i] = g[i];
    }
    for (int32_t j = t.degree; j >= 1; --j) {
        S* h = ht + (j - 1) * size;
        if (j == t.degree) {
            for (int64_t i = 0; i < size; ++i) {
                h[i] = 0;
            }
        } else {
            oft_product(q, h + size, h, b);
            for (int64_t i = 0; i < size; ++i) {
                h[i] = S(0) - h[i];
            }
        }
        for (int64_t i = 0; i < b; ++i) {
            h[i * b + i] += j == t.degree ? last : S(2);
        }
    }
    for (int32_t j = 0; j < t.degree; ++j) {
        oft_product(gj, ht + j * size, product, b);
        for (int64_t i = 0; i < size; ++i) {
            gq[i] += product[i];
        }
        oft_product(q, gj, product, b);
        for (int64_t i = 0; i < size; ++i) {
            gj[i] = S(0) - product[i];
        }
    }
}

// dL/dQ of the exact transform: 1/2 M G M with M = (I + R)^T = 2 I + D^T.
template <typename S>
static void oft_exact_gradient(const S* q, const S* g, int64_t b, S* gq, S* work) {
    const int64_t size = b * b;
    S* d = work;
    S* m = work + size;
    S* product = work + 2 * size;
    oft_exact_delta(q, b, d, m);
    for (int64_t i = 0; i < b; ++i) {
        for (int64_t j = 0; j < b; ++j) {
            m[i * b + j] = d[j * b + i];
        }
        m[i * b + i] += S(2);
    }
    oft_product(m, g, product, b);
    oft_product(product, m, gq, b);
    for (int64_t i = 0; i < size; ++i) {
        gq[i] *= S(0.5);
    }
}

// Adds dL/dv to dv; g = dL/dD, [b, b].
template <typename S>
static void oft_gradient(const S* v, const S* g, int64_t b, const OftTransform& t, S* dv, S* work) {
    S* q = work;
    S* gq = work + b * b;
    S* rest = work + 2 * b * b;
    oft_unpack(v, b, q);
    if (t.exact) {
        oft_exact_gradient(q, g, b, gq, rest);
    } else if (t.degree == 4 && t.last == 1.0f) {
        oft_series4_gradient(q, g, b, gq, rest);
    } else {
        oft_series_gradient(q, g, b, t, gq, rest);
    }
    int64_t at = 0;
    for (int64_t i = 0; i < b; ++i) {
        for (int64_t j = i + 1; j < b; ++j) {
            dv[at++] += gq[i * b + j] - gq[j * b + i];
        }
    }
}

// ||Q||_F, and the bound (||Q^2||_F / sqrt 2)^(1/2) on the largest rotation parameter theta.
struct OftBound {
    double norm = 0;
    double theta = 0;
};

// From ||Q||_F^2 and ||Q^2||_F^2.
inline OftBound oft_bound_of(double squares, double squares_of_square) {
    return {
        __builtin_sqrt(squares),
        __builtin_sqrt(__builtin_sqrt(squares_of_square) * 0.7071067811865476)};
}

// Sum of squares of a [b, b] matrix; one partial sum per column, so that the loop vectorises.
template <typename S>
static double oft_sum_of_squares(const S* matrix, int64_t b, S* sums) {
    for (int64_t j = 0; j < b; ++j) {
        sums[j] = 0;
    }
    for (int64_t i = 0; i < b; ++i) {
        for (int64_t j = 0; j < b; ++j) {
            sums[j] += matrix[i * b + j] * matrix[i * b + j];
        }
    }
    double sum = 0;
    for (int64_t j = 0; j < b; ++j) {
        sum += static_cast<double>(sums[j]);
    }
    return sum;
}

template <typename S>
static OftBound oft_bound(const S* v, int64_t b, S* work) {
    S* q = work;
    S* square = work + b * b;
    S* sums = work + 2 * b * b;
    oft_unpack(v, b, q);
    oft_product(q, q, square, b);
    const double squares_of_square = oft_sum_of_squares(square, b, sums);
    return oft_bound_of(oft_sum_of_squares(q, b, sums), squares_of_square);
}

}  // namespace orbit
