#define GRANET_WIDTH 16
#define GRANET_MAX_VECTORS 16
#define GRANET_MAX_BLOCK_VECTORS 6
#define GRANET_ISA_NAME "avx512"
#include "kernels.inc"

const granet::Kernels& granet::kernels_avx512() { return kTable; }
