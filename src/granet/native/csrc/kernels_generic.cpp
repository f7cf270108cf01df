#define GRANET_WIDTH 4
#define GRANET_MAX_VECTORS 8
#define GRANET_MAX_BLOCK_VECTORS 2
#define GRANET_ISA_NAME "generic"
#include "kernels.inc"

const granet::Kernels& granet::kernels_generic() { return kTable; }
