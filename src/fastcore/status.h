/* What a C function can report; the border turns it into an exception. */
#ifndef FC_STATUS_H
#define FC_STATUS_H

typedef enum fc_status {
    FC_OK = 0,
    FC_BAD_ARGUMENT, /* a size, index or option outside its contract */
    FC_NO_MEMORY,
    FC_STALE, /* the ISA was changed after the program was bound */
} fc_status;

#endif
