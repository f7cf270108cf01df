#define GRANET_WIDTH 8
#define GRANET_MAX_VECTORS 5
#define GRANET_MAX_GRADIENT_VECTORS 8
#define GRANET_ISA_NAME "avx2"
#include "bfloat16.inc"

const granet::Bfloat16Kernels& granet::bfloat16_avx2() { return kBfloat16Table; }
