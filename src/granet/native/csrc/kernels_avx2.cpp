#define GRANET_WIDTH 8
#define GRANET_MAX_VECTORS 12
#define GRANET_MAX_BLOCK_VECTORS 3
#define GRANET_ISA_NAME "avx2"
#include "kernels.inc"

const granet::Kernels& granet::kernels_avx2() { return kTable; }
