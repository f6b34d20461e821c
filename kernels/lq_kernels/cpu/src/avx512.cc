// AVX-512: avx512.h holds the operations, engine.h the product.
#include "avx512.h"

namespace lq {

const Kernel kAvx512 = {"avx512", supports_avx512, always, always, scratch_bytes, begin, panels<Avx512>};

}  // namespace lq
