#define GRANET_WIDTH 16
#define GRANET_MAX_VECTORS 12
#define GRANET_MAX_GRADIENT_VECTORS 16
#define GRANET_ISA_NAME "avx512bf16"
#include "bfloat16.inc"

const granet::Bfloat16Kernels& granet::bfloat16_avx512bf16() { return kBfloat16Table; }
