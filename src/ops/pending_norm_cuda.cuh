// The norm of one row, put off until the next op: the rotations of an OFT adapter norm the row
// themselves, with the same bits, and store it too, which spares a kernel. Anything else launches
// it first (Stream::handle()).
#pragma once

#include <span>

#include "device/cuda/rows.cuh"

namespace orbit::cuda {

class PendingNorm final : public DeferredWork {
  public:
    // y = x / rms(x) weight; [width] all of them, a multiple of 8.
    struct Norm {
        const bf16* x = nullptr;
        const float* weight = nullptr;
        float eps = 0.0f;
        int64_t width = 0;
        bf16* y = nullptr;
    };

    static void put_off(Stream& stream, const Norm& norm);

    // The norm that makes x, now the caller's to do; y null: x is there. `outputs`, [width] each,
    // are what the caller writes while he reads the norm's x: they may not overlap it.
    static Norm take(Stream& stream, const bf16* x, std::span<const bf16* const> outputs);

    void launch(const Stream& stream) override;

  private:
    Norm norm_;
};

}  // namespace orbit::cuda
